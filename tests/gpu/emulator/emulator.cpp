// The emulator's scheduler, and the few functions of the HIP runtime that the backend calls. Everything a stream is
// asked for is done at once.

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <boost/context/fiber.hpp>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "hip/hip_runtime.h"

namespace emulator {

thread_local Lane* here = nullptr;

namespace {

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", what, here->block.x, here->block.y, here->block.z,
               here->thread.x);
  std::abort();
}

// Lanes that meet: whoever waits goes on when all that still run have come.
struct Barrier {
  int running = 0, arrived = 0;
  uint64_t times = 0;

  void open_if_complete() {
    if (arrived == running && running > 0) {
      arrived = 0;
      ++times;
    }
  }
};

struct Wave {
  Barrier barrier;
  uint32_t present[2];  // lanes that took part
  alignas(64) uint8_t passed[2][kWave * 64];
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Lane lane;
  boost::context::fiber body, scheduler;
  Barrier* waits_at = nullptr;
  uint64_t waits_for = 0;  // times of the barrier
  int exchanges = 0;
  int yields = 0;
  bool done = false;
  std::vector<Copy> begun;                // copies that are no batch yet
  std::deque<std::vector<Copy>> batches;  // under way

  bool ready() const { return !done && (waits_at == nullptr || waits_at->times != waits_for); }
};

// Stacks are used again: a block of 1024 lanes comes after the other.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t{128} << 10;
  boost::context::stack_context allocate() {
    boost::context::stack_context s;
    void* p = nullptr;
    if (free_.empty()) {
      p = std::malloc(kBytes);
      if (p == nullptr) die("no memory for stacks");
    } else {
      p = free_.back();
      free_.pop_back();
    }
    s.size = kBytes;
    s.sp = static_cast<char*>(p) + kBytes;
    return s;
  }
  void deallocate(boost::context::stack_context& s) { free_.push_back(static_cast<char*>(s.sp) - s.size); }
  ~Stacks() {
    for (void* p : free_) std::free(p);
  }

 private:
  std::vector<void*> free_;
};

struct StackSource {
  Stacks* stacks;
  boost::context::stack_context allocate() { return stacks->allocate(); }
  void deallocate(boost::context::stack_context& s) { stacks->deallocate(s); }
};

struct Launch {
  dim3 blocks, threads;
  size_t shared = 0;
  std::function<void()> kernel;
};

#if defined(DFLASH_EMULATE_STAGED)
// Blocks wait for each other, so as many run at a time as one of these launches has.
constexpr int kUnits = 6;
constexpr unsigned kLeastThreads = kUnits;
#else
constexpr int kUnits = 40;
constexpr unsigned kLeastThreads = 1;
#endif
constexpr int kTurns = 64;
constexpr int kPatience = 1 << 22;

// Runs blocks, one after the other.
class Multiprocessor {
 public:
  void run(const Launch& launch, dim3 block) {
    const int threads = static_cast<int>(launch.threads.x);
    const int n_waves = (threads + kWave - 1) / kWave;
    if (static_cast<int>(waves_.size()) < n_waves) waves_.resize(static_cast<size_t>(n_waves));
    if (static_cast<int>(fibers_.size()) < threads) fibers_.resize(static_cast<size_t>(threads));
    shared_.resize(launch.shared + 64);
    uint8_t* const shared = shared_.data() + (64 - reinterpret_cast<uintptr_t>(shared_.data()) % 64) % 64;
    barrier_ = {threads, 0, 0};
    for (int w = 0; w < n_waves; ++w) {
      const int lanes = std::min(kWave, threads - w * kWave);
      waves_[static_cast<size_t>(w)].barrier = {lanes, 0, 0};
    }
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers_[static_cast<size_t>(t)];
      f.lane = {dim3(static_cast<unsigned>(t)),         block, launch.threads, launch.blocks, shared,
                &waves_[static_cast<size_t>(t / kWave)]};
      f.waits_at = nullptr;
      f.done = false;
      f.exchanges = 0;
      f.yields = 0;
      f.begun.clear();
      f.batches.clear();
      f.body = boost::context::fiber(std::allocator_arg, StackSource{&stacks_}, [&f, &launch](auto&& scheduler) {
        f.scheduler = std::move(scheduler);
        launch.kernel();
        f.done = true;
        return std::move(f.scheduler);
      });
    }
    int left = threads;
    while (left > 0) {
      bool moved = false;
      for (int i = 0; i < n_waves; ++i) {
        const int w = block.x % 2 == 0 ? i : n_waves - 1 - i;  // whoever counts on an order is wrong in one of them
        // a wave goes on by itself until all of it waits for others (or asks again and again what another block did)
        bool wave_moved = true;
        for (int turn = 0; wave_moved && turn < kTurns; ++turn) {
          wave_moved = false;
          for (int t = w * kWave; t < std::min(threads, (w + 1) * kWave); ++t) {
            Fiber& f = fibers_[static_cast<size_t>(t)];
            if (!f.ready()) continue;
            wave_moved = moved = true;
            f.waits_at = nullptr;
            here = &f.lane;
            current_ = &f;
            f.body = std::move(f.body).resume();
            if (!f.done) continue;
            --left;
            Wave& wave = waves_[static_cast<size_t>(w)];
            --wave.barrier.running;
            wave.barrier.open_if_complete();
            --barrier_.running;
            barrier_.open_if_complete();
          }
        }
      }
      if (!moved) die("lanes wait for each other at different places");
    }
    here = nullptr;
  }

  void yield() {
    if (++current_->yields > kPatience) die("a lane waits in vain for another block");
    current_->waits_at = nullptr;
    current_->scheduler = std::move(current_->scheduler).resume();
  }

  void wait(Barrier& b) {
    Fiber& f = *current_;
    f.waits_at = &b;
    f.waits_for = b.times;
    ++b.arrived;
    b.open_if_complete();
    if (f.ready()) {  // the last one to come
      f.waits_at = nullptr;
      return;
    }
    f.scheduler = std::move(f.scheduler).resume();
  }

  Barrier barrier_;
  Fiber* current_ = nullptr;

 private:
  Stacks stacks_;
  std::vector<Wave> waves_;
  std::vector<Fiber> fibers_;
  std::vector<uint8_t> shared_;
};

Multiprocessor& multiprocessor() {
  static thread_local Multiprocessor m;
  return m;
}

// As many blocks at a time as the CPU has threads (or as wait for each other).
class Device {
 public:
  Device() {
    const unsigned n = std::max(kLeastThreads, std::thread::hardware_concurrency());
    for (unsigned i = 1; i < n; ++i) helpers_.emplace_back([this] { help(); });
  }
  ~Device() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    begin_.notify_all();
    for (std::thread& t : helpers_) t.join();
  }

  void run(const Launch& launch) {
    const int64_t blocks = static_cast<int64_t>(launch.blocks.x) * launch.blocks.y * launch.blocks.z;
    if (blocks == 0 || launch.threads.x > 1024 || launch.threads.y != 1) {
      std::fprintf(stderr, "emulator: a launch of %lld blocks of %u threads\n", static_cast<long long>(blocks),
                   launch.threads.x);
      std::abort();
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      launch_ = &launch;
      next_ = 0;
      blocks_ = blocks;
      busy_ = static_cast<int>(helpers_.size());
      ++round_;
    }
    if (blocks > 1) begin_.notify_all();
    take_blocks(launch);
    std::unique_lock<std::mutex> lock(mutex_);
    if (blocks == 1) begin_.notify_all();
    end_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void take_blocks(const Launch& launch) {
    for (int64_t i = next_++; i < blocks_; i = next_++) {
      const auto x = static_cast<unsigned>(i % launch.blocks.x),
                 y = static_cast<unsigned>(i / launch.blocks.x % launch.blocks.y),
                 z = static_cast<unsigned>(i / launch.blocks.x / launch.blocks.y);
      multiprocessor().run(launch, dim3(x, y, z));
    }
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      const Launch* launch = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        begin_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
        launch = launch_;
      }
      take_blocks(*launch);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) end_.notify_all();
    }
  }

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  const Launch* launch_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t blocks_ = 0;
  int busy_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
};

Device& device() {
  static Device d;
  return d;
}

using Work = std::function<void()>;

struct Stream {
  bool records = false;
  std::vector<Work> recorded;
};

Stream& stream_of(hipStream_t s) {
  static Stream none;
  return s == nullptr ? none : *reinterpret_cast<Stream*>(s);
}

void submit(hipStream_t s, Work work) {
  Stream& stream = stream_of(s);
  if (stream.records) {
    stream.recorded.push_back(std::move(work));
  } else {
    work();
  }
}

struct Graph {
  std::vector<Work> work;
};

// An allocation ends where its pages end (but for 64 bytes of alignment), and the page after cannot be touched.
struct Memory {
  void* pages = nullptr;
  size_t mapped = 0, bytes = 0;
};

struct Heap {
  std::mutex mutex;
  std::map<void*, Memory> pieces;
  size_t used = 0;
};
Heap& heap() {
  static Heap h;
  return h;
}
constexpr size_t kTotal = size_t{8} << 30;

}  // namespace

void block_barrier() {
  Multiprocessor& m = multiprocessor();
  m.wait(m.barrier_);
}

void yield() { multiprocessor().yield(); }

void copy_begin(void* to, const void* from, int bytes) {
  multiprocessor().current_->begun.push_back({to, from, bytes});
}

void copy_commit() {
  Fiber& f = *multiprocessor().current_;
  f.batches.push_back(std::move(f.begun));
  f.begun.clear();
}

void copy_wait(int later) {
  Fiber& f = *multiprocessor().current_;
  while (static_cast<int>(f.batches.size()) > later) {
    for (const Copy& c : f.batches.front()) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    f.batches.pop_front();
  }
}

void wave_barrier() { multiprocessor().wait(static_cast<Wave*>(here->wave)->barrier); }

const uint8_t* exchange(const void* from, size_t bytes, uint32_t* lanes) {
  Multiprocessor& m = multiprocessor();
  Wave& wave = *static_cast<Wave*>(here->wave);
  const int turn = m.current_->exchanges++ % 2;
  if (wave.barrier.arrived == 0) wave.present[turn] = 0;
  wave.present[turn] |= 1u << lane();
  std::memcpy(wave.passed[turn] + lane() * 64, from, bytes);
  m.wait(wave.barrier);
  *lanes = wave.present[turn];
  return wave.passed[turn];
}

void check_lane(uint32_t lanes, int lane) {
  if ((lanes >> lane & 1u) == 0) die("a lane that has returned was asked for its value");
}

void launch(hipStream_t stream, dim3 blocks, dim3 threads, size_t shared, std::function<void()> kernel) {
  auto work = [l = Launch{blocks, threads, shared, std::move(kernel)}] { device().run(l); };
  submit(stream, std::move(work));
}

}  // namespace emulator

// ---- the runtime ----------------------------------------------------------------------------------------------------

using namespace emulator;

extern "C" {

const char* hipGetErrorName(hipError_t e) { return e == hipSuccess ? "hipSuccess" : "hipError"; }
const char* hipGetErrorString(hipError_t e) { return e == hipErrorOutOfMemory ? "out of memory" : "emulated error"; }
hipError_t hipGetLastError() { return hipSuccess; }

hipError_t hipGetDeviceCount(int* n) {
  *n = 1;
  return hipSuccess;
}
hipError_t hipSetDevice(int) { return hipSuccess; }
hipError_t hipDeviceGetName(char* name, int n, hipDevice_t) {
  std::snprintf(name, static_cast<size_t>(n), "gfx1151 emulated on the CPU");
  return hipSuccess;
}
hipError_t hipDeviceGetAttribute(int* v, hipDeviceAttribute_t a, int) {
  switch (a) {
    case hipDeviceAttributeMultiprocessorCount:
      *v = kUnits / 2;  // HIP counts work-group processors
      return hipSuccess;
    case hipDeviceAttributeIntegrated:
      *v = 1;
      return hipSuccess;
    case hipDeviceAttributeComputeCapabilityMajor:
      *v = 11;
      return hipSuccess;
    case hipDeviceAttributeComputeCapabilityMinor:
      *v = 5;
      return hipSuccess;
    default:
      return hipErrorInvalidValue;
  }
}
hipError_t hipFuncGetAttributes(hipFuncAttributes* a, const void*) {
  *a = {};
  return hipSuccess;
}
hipError_t hipOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 1;
  return hipSuccess;
}
hipError_t hipDeviceSynchronize() { return hipSuccess; }

hipError_t hipMalloc(void** p, size_t n) {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  if (h.used + n > kTotal) return hipErrorOutOfMemory;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = (n + 63) / 64 * 64;
  const size_t whole = (bytes + page - 1) / page * page;
  void* const pages =
      mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return hipErrorOutOfMemory;
  mprotect(static_cast<char*>(pages) + whole, page, PROT_NONE);
  *p = static_cast<char*>(pages) + (whole - bytes);
  h.pieces[*p] = {pages, whole + page, n};
  h.used += n;
  // Not zero, as memory seldom is: what nobody wrote shows as NaN or nonsense.
  if (n <= size_t{1} << 24) std::memset(*p, 0xff, n);
  return hipSuccess;
}
hipError_t hipFree(void* p) {
  if (p == nullptr) return hipSuccess;
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  const auto it = h.pieces.find(p);
  if (it == h.pieces.end()) return hipErrorInvalidValue;
  munmap(it->second.pages, it->second.mapped);
  h.used -= it->second.bytes;
  h.pieces.erase(it);
  return hipSuccess;
}
hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  *free = kTotal - h.used;
  *total = kTotal;
  return hipSuccess;
}
hipError_t hipHostMalloc(void** p, size_t n, unsigned) {
  constexpr size_t kPage = 4096;  // pinned memory begins at a page, which direct reads rely on
  *p = std::aligned_alloc(kPage, (n + kPage - 1) / kPage * kPage);
  return *p != nullptr ? hipSuccess : hipErrorOutOfMemory;
}
hipError_t hipHostFree(void* p) {
  std::free(p);
  return hipSuccess;
}
hipError_t hipMemcpyAsync(void* d, const void* s, size_t n, hipMemcpyKind, hipStream_t q) {
  submit(q, [=] { std::memcpy(d, s, n); });
  return hipSuccess;
}
hipError_t hipMemsetAsync(void* d, int v, size_t n, hipStream_t q) {
  submit(q, [=] { std::memset(d, v, n); });
  return hipSuccess;
}

hipError_t hipStreamCreateWithFlags(hipStream_t* q, unsigned) {
  *q = reinterpret_cast<hipStream_t>(new Stream);
  return hipSuccess;
}
hipError_t hipStreamSynchronize(hipStream_t) { return hipSuccess; }
hipError_t hipStreamDestroy(hipStream_t q) {
  delete reinterpret_cast<Stream*>(q);
  return hipSuccess;
}
hipError_t hipStreamBeginCapture(hipStream_t q, hipStreamCaptureMode) {
  stream_of(q).records = true;
  stream_of(q).recorded.clear();
  return hipSuccess;
}
hipError_t hipStreamEndCapture(hipStream_t q, hipGraph_t* g) {
  Stream& s = stream_of(q);
  s.records = false;
  *g = reinterpret_cast<hipGraph_t>(new Graph{std::move(s.recorded)});
  s.recorded.clear();
  return hipSuccess;
}
hipError_t hipGraphInstantiate(hipGraphExec_t* e, hipGraph_t g, hipGraphNode_t*, char*, size_t) {
  *e = reinterpret_cast<hipGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(g)));
  return hipSuccess;
}
hipError_t hipGraphDestroy(hipGraph_t g) {
  delete reinterpret_cast<Graph*>(g);
  return hipSuccess;
}
hipError_t hipGraphLaunch(hipGraphExec_t e, hipStream_t) {
  for (const Work& work : reinterpret_cast<Graph*>(e)->work) work();
  return hipSuccess;
}
hipError_t hipGraphExecDestroy(hipGraphExec_t e) {
  delete reinterpret_cast<Graph*>(e);
  return hipSuccess;
}

hipError_t hipEventCreateWithFlags(hipEvent_t* e, unsigned) {
  *e = reinterpret_cast<hipEvent_t>(new int(0));
  return hipSuccess;
}
hipError_t hipEventRecord(hipEvent_t, hipStream_t) { return hipSuccess; }
hipError_t hipEventSynchronize(hipEvent_t) { return hipSuccess; }
hipError_t hipEventDestroy(hipEvent_t e) {
  delete reinterpret_cast<int*>(e);
  return hipSuccess;
}
}
