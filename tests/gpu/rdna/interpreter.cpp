#include "interpreter.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>

namespace rdna {
namespace {

constexpr uint64_t kMostInstructions = uint64_t{1} << 33;  // of one wave, before it counts as hung
constexpr uint64_t kTurn = 1 << 20;  // instructions until the next wave's turn: it may wait for that

void set_initial_registers(Wave& w, const Launch& launch) {
  const Kernel& k = *launch.kernel;
  for (uint32_t r = 0; r < std::min(256u, k.vgprs + 8); r++) std::fill(w.v[r], w.v[r] + kLanes, kPoison);
  std::fill(std::begin(w.s), std::end(w.s), kPoison);
  // The user SGPRs that the descriptor enables, in this order; then the group's ids.
  uint32_t s = 0;
  if (k.properties & (1 << 0 | 1 << 1 | 1 << 2 | 1 << 5)) fault("user SGPRs ", hex(k.properties), " are not modelled");
  if (k.properties & 1 << 3) {
    const auto p = reinterpret_cast<uint64_t>(launch.arguments.data());
    w.s[s++] = static_cast<uint32_t>(p);
    w.s[s++] = static_cast<uint32_t>(p >> 32);
  }
  if (k.properties & 1 << 4) w.s[s] = w.s[s + 1] = 0, s += 2;
  s = k.rsrc2 >> 1 & 31;
  for (int d = 0; d < 3; d++) {
    if (k.rsrc2 >> (7 + d) & 1) w.s[s++] = w.group->id[d];
  }
  uint32_t exec = 0;
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  for (uint32_t l = 0; l < kLanes; l++) {
    const uint32_t t = w.number * kLanes + l;
    if (t >= threads) continue;
    exec |= 1u << l;
    const uint32_t x = t % launch.block[0], y = t / launch.block[0] % launch.block[1],
                   z = t / launch.block[0] / launch.block[1];
    w.v[0][l] = x | y << 10 | z << 20;
  }
  w.s[kExec] = exec;
  w.s[kExec + 1] = 0;
  w.scc = false;
  w.pc = k.index_of(k.entry);
  w.state = Wave::kRunning;
  w.fuel = kMostInstructions;
  w.vector_loads = w.other_loads = Outstanding();
  w.outstanding = false;
}

void check_waits(const Wave& w, const Instruction& in) {
  const bool vector = in.uses.meets(w.vector_loads.pending) ||
                      (in.counter != Instruction::kVectorLoad && in.counter != Instruction::kFlat &&
                       in.defines.meets(w.vector_loads.pending));
  const bool other = in.uses.meets(w.other_loads.pending) ||
                     (in.counter == Instruction::kVectorLoad && in.defines.meets(w.other_loads.pending));
  if (in.klass == Class::kBarrier && std::any_of(w.other_loads.entries.begin(), w.other_loads.entries.end(),
                                                 [](const auto& e) { return !e.scalar; })) {
    fault("a barrier before the wave's accesses of LDS are done (lgkmcnt)");
  }
  if (vector || other) fault("a register that an outstanding load still writes (", vector ? "vmcnt" : "lgkmcnt", ")");
}

void count_outstanding(Wave& w, const Instruction& in) {
  static const RegisterSet kNone;
  w.outstanding = true;
  switch (in.counter) {
    case Instruction::kVectorLoad:
      w.vector_loads.push(in.defines, false);
      break;
    case Instruction::kShared:
      w.other_loads.push(in.defines, false);
      break;
    case Instruction::kScalarMemory:
      w.other_loads.push(in.defines, true);
      break;
    case Instruction::kFlat:  // in both counters; what it loads comes by where its lanes point
      if (in.dst.kind != Operand::kNone) w.vector_loads.push(w.flat_global ? in.defines : kNone, false);
      w.other_loads.push(w.flat_shared ? in.defines : kNone, false);
      w.flat_global = w.flat_shared = false;
      break;
    case Instruction::kNoCounter:
      break;
  }
}

// Until the wave ends, waits at a barrier or its turn is over.
void run_wave(Wave& w) {
  Group& g = *w.group;
  const Instruction* code = g.kernel->code.data();
  for (uint64_t left = std::min(kTurn, w.fuel); left > 0; left--) {
    w.at = w.pc;
    const Instruction& in = code[w.pc];
    ++g.times[w.pc];
    if (w.outstanding && g.check_waits) check_waits(w, in);
    ++w.pc;
    in.run(w, in);
    if (in.counter != Instruction::kNoCounter) count_outstanding(w, in);
    if (w.state != Wave::kRunning) return;
  }
  w.fuel -= std::min(kTurn, w.fuel);
  if (w.fuel == 0) fault("the wave does not end");
}

}  // namespace

void Outstanding::push(const RegisterSet& registers, bool scalar) {
  entries.push_back({registers, scalar});
  pending |= registers;
}

// Scalar loads may return in any order, so that only a wait for all of them says anything.
void Outstanding::wait(size_t left) {
  if (entries.size() <= left) return;
  if (left > 0 && std::any_of(entries.begin(), entries.end(), [](const Entry& e) { return e.scalar; })) return;
  entries.erase(entries.begin(), entries.end() - static_cast<std::ptrdiff_t>(left));
  pending = RegisterSet();
  for (const Entry& e : entries) pending |= e.registers;
}

void Group::find(uint64_t address, uint32_t bytes, bool write) {
  auto r = std::upper_bound(regions.begin(), regions.end(), address,
                            [](uint64_t a, const Region& b) { return a < b.begin; });
  if (r != regions.begin() && (--r, address >= r->begin && address + bytes <= r->end)) {
    if (write && !r->writable) fault("writes read-only memory at ", hex(address));
    last = *r;
    return;
  }
  std::string where = "outside all allocations";
  if (r != regions.end() && address >= r->begin && address < r->end + (1 << 16)) {
    where = std::to_string(static_cast<int64_t>(address - r->end)) + " bytes behind the end of an allocation of " +
            std::to_string(r->end - r->begin);
  }
  fault(write ? "writes " : "reads ", std::to_string(bytes), " bytes at ", hex(address), ", ", where);
}

void Group::check_race(uint32_t wave, uint32_t address, uint32_t bytes, Touch touch) {
  // what each way of touching a byte may not meet of another wave's
  static constexpr bool kConflicts[3][3] = {{false, true, true}, {true, true, true}, {true, true, false}};
  static constexpr const char* kNames[3] = {"reads", "writes", "adds to"};
  for (uint32_t b = address; b < address + bytes; b++) {
    uint32_t* by = touched[b].by;
    for (int other = 0; other < 3; other++) {
      if (kConflicts[touch][other] && by[other] >> 8 == phase && (by[other] & 255) != wave) {
        fault("race: wave ", std::to_string(wave), " ", kNames[touch], " byte ", std::to_string(b), " of LDS, which ",
              (by[other] & 255) == 255 ? "several waves" : "wave " + std::to_string(by[other] & 255), " ",
              kNames[other], " too, with no barrier between");
      }
    }
    by[touch] = phase << 8 | (by[touch] >> 8 == phase && (by[touch] & 255) != wave ? 255 : wave);
  }
}

void Interpreter::run_group(Worker& worker, const Launch& launch, uint32_t number, const Options& options) {
  const Kernel& k = *launch.kernel;
  Group& g = worker.group;
  g.kernel = &k;
  g.id[0] = number % launch.grid[0];
  g.id[1] = number / launch.grid[0] % launch.grid[1];
  g.id[2] = number / launch.grid[0] / launch.grid[1];
  g.lds.resize(k.lds + launch.dynamic_lds);
  for (size_t i = 0; i + 4 <= g.lds.size(); i += 4) std::memcpy(g.lds.data() + i, &kPoison, 4);
  g.touched.resize(options.check_races ? g.lds.size() : 0);
  if (++g.phase >> 23) {  // phases are 24 bits
    g.phase = 1;
    std::fill(g.touched.begin(), g.touched.end(), Touched());
  }
  const uint32_t waves = (launch.block[0] * launch.block[1] * launch.block[2] + kLanes - 1) / kLanes;
  while (worker.waves.size() < waves) worker.waves.push_back(std::make_unique<Wave>());
  for (uint32_t i = 0; i < waves; i++) {
    worker.waves[i]->group = &g;
    worker.waves[i]->number = i;
    set_initial_registers(*worker.waves[i], launch);
  }
  for (;;) {
    uint32_t running = 0, waiting = 0;
    for (uint32_t i = 0; i < waves; i++) {
      Wave& w = *worker.waves[options.reverse_waves ? waves - 1 - i : i];
      if (w.state == Wave::kRunning) {
        try {
          run_wave(w);
        } catch (const Fault& f) {
          const Instruction& in = k.code[w.at];
          fault(f.what(), "\n  in ", readable_name(k.name), ", group ", std::to_string(g.id[0]), ",",
                std::to_string(g.id[1]), ",", std::to_string(g.id[2]), ", wave ", std::to_string(w.number), ", EXEC ",
                hex(w.exec()), ", at ", hex(in.address), ": ", in.text);
        }
      }
      running += w.state == Wave::kRunning;
      waiting += w.state == Wave::kAtBarrier;
    }
    if (running > 0) continue;
    if (waiting == 0) return;
    g.phase++;
    for (uint32_t i = 0; i < waves; i++) {
      if (worker.waves[i]->state == Wave::kAtBarrier) worker.waves[i]->state = Wave::kRunning;
    }
  }
}

void Interpreter::run(const Launch& launch, const std::vector<Region>& memory, const Options& options) {
  Kernel& k = *launch.kernel;
  const std::string name = readable_name(k.name);
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  if (threads > k.max_threads)
    fault(name, ": ", std::to_string(threads), " threads a group, compiled for ", std::to_string(k.max_threads));
  if (k.lds + launch.dynamic_lds > 64 * 1024)
    fault(name, ": ", std::to_string(k.lds + launch.dynamic_lds), " bytes of LDS, a group may have 65536");
  if (k.scratch > 0) fault(name, ": scratch memory is not modelled");
  if ((k.rsrc1 >> 12 & 15) != 0 || (k.rsrc1 >> 16 & 15) != 15)
    fault(name, ": this rounding or denormal mode is not modelled");
  if (!(k.properties & 1 << 10)) fault(name, ": wave64 is not modelled");

  const uint32_t groups = launch.grid[0] * launch.grid[1] * launch.grid[2];
  uint32_t n =
      options.threads > 0 ? static_cast<uint32_t>(options.threads) : std::max(1u, std::thread::hardware_concurrency());
  n = std::min(n, groups);
  while (workers_.size() < n) workers_.push_back(std::make_unique<Worker>());
  std::atomic<uint32_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&](Worker& worker) {
    worker.times.assign(k.code.size(), 0);
    worker.lanes.assign(k.code.size(), 0);
    worker.misaligned.assign(k.code.size(), 0);
    worker.group.times = worker.times.data();
    worker.group.lanes = worker.lanes.data();
    worker.group.misaligned = worker.misaligned.data();
    worker.group.regions = memory;
    worker.group.last = {1, 0, false};
    worker.group.check_waits = options.check_waits;
    worker.group.check_alignment = options.check_alignment;
    try {
      for (uint32_t i; (i = next++) < groups;)
        run_group(worker, launch, options.reverse_groups ? groups - 1 - i : i, options);
    } catch (const Fault& f) {
      next = groups;
      const std::lock_guard<std::mutex> lock(mutex);
      if (error.empty()) error = f.what();
    }
  };
  std::vector<std::thread> pool;
  for (uint32_t i = 1; i < n; i++) pool.emplace_back(work, std::ref(*workers_[i]));
  work(*workers_[0]);
  for (std::thread& t : pool) t.join();
  k.launches++;
  k.times.resize(k.code.size());
  k.lanes.resize(k.code.size());
  k.misaligned.resize(k.code.size());
  for (uint32_t i = 0; i < n; i++) {
    for (size_t c = 0; c < k.code.size(); c++) {
      k.times[c] += workers_[i]->times[c];
      k.lanes[c] += workers_[i]->lanes[c];
      k.misaligned[c] += workers_[i]->misaligned[c];
    }
  }
  if (!error.empty()) fault(error);
}

}  // namespace rdna
