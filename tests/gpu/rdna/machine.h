#pragma once
// The state of an RDNA3.5 work group as instructions see it, and an instruction as the interpreter runs it.
// Registers, EXEC, SCC and their numbering: AMD, "RDNA3.5 Instruction Set Architecture", chapters 3 and 5.

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

namespace rdna {

inline constexpr int kLanes = 32;  // wave32
inline constexpr uint32_t kAll = 0xffffffffu;
// What a register or memory holds before its first write: NaN as f16, bf16, f32 and f64, and no small integer.
inline constexpr uint32_t kPoison = 0xffc5ffc5u;

// Scalar operands by their encoding. 106.. are VCC, 126 EXEC.
enum Scalar : uint16_t { kVcc = 106, kNull = 124, kM0 = 125, kExec = 126, kScc = 253 };

// Flat addresses whose upper half is one of these mean LDS or scratch. No host address looks so.
inline constexpr uint32_t kSharedAperture = 0x40000000u, kPrivateAperture = 0x50000000u;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  std::string text;
  ((text += parts), ...);
  throw Fault(text);
}

std::string hex(uint64_t v);

// Memory that a kernel may touch: [begin, end).
struct Region {
  uint64_t begin, end;
  bool writable;
};

// Registers as a set: VGPRs 0..255, then SGPRs 0..127.
struct RegisterSet {
  std::array<uint64_t, 6> bits{};
  void add(bool vector, int first, int count) {
    for (int r = first + (vector ? 0 : 256); count-- > 0; r++) {
      if (r < 384) bits[static_cast<size_t>(r / 64)] |= uint64_t{1} << (r % 64);
    }
  }
  bool meets(const RegisterSet& o) const {
    uint64_t any = 0;
    for (size_t i = 0; i < bits.size(); i++) any |= bits[i] & o.bits[i];
    return any != 0;
  }
  void operator|=(const RegisterSet& o) {
    for (size_t i = 0; i < bits.size(); i++) bits[i] |= o.bits[i];
  }
};

struct Operand {
  enum Kind : uint8_t { kNone, kVector, kScalar, kConstant, kOff };
  Kind kind = kNone;
  bool neg = false, abs = false;
  bool is_float = false;  // a constant written with a point: its bits depend on the operand's type
  uint16_t reg = 0;
  uint16_t count = 1;  // registers named
  double real = 0;     // is_float
  uint64_t value = 0;  // of a constant, by the instruction's operand type once bound
  std::string text;    // as disassembled
};

// What the dynamic counts are kept by.
enum class Class : uint8_t {
  kValu,
  kDual,
  kTranscendental,
  kDouble,
  kDot,
  kPacked,
  kWmma,
  kLane,
  kSalu,
  kScalarLoad,
  kLoad,
  kStore,
  kAtomic,
  kLds,
  kBranch,
  kBarrier,
  kWait,
  kOther,
  kCount
};

struct Wave;
struct Instruction;
using Run = void (*)(Wave&, const Instruction&);

struct Instruction {
  Run run = nullptr;
  Run inner = nullptr;  // under DPP: what runs on the permuted operand
  Operand dst, dst2, src[4];
  bool clamp = false, glc = false;
  uint8_t op_sel = 0, op_sel_hi = 7, neg_lo = 0, neg_hi = 0;  // a bit an operand
  bool fetch_inactive = false, bound_ctrl = false;            // DPP
  uint32_t write_lanes = kAll;                                // DPP: row_mask and bank_mask
  std::array<int8_t, kLanes> lane_source{};                   // DPP: where each lane's src0 comes from, -1: nowhere
  int32_t offset = 0, offset1 = 0;                            // memory; SOPP's immediate
  uint32_t target = 0;                                        // branches: index of the instruction
  uint32_t index = 0;
  int second = -1;  // VOPD: the instruction beside
  enum Counter : uint8_t { kNoCounter, kVectorLoad, kShared, kScalarMemory, kFlat };
  Counter counter = kNoCounter;  // what it is outstanding in
  Class klass = Class::kOther;
  RegisterSet uses, defines;  // defines: of loads alone
  uint64_t address = 0;
  uint32_t size = 4;  // bytes
  std::string text;
};

struct Kernel;

// A counter of outstanding memory instructions and the registers that they will still write.
struct Outstanding {
  struct Entry {
    RegisterSet registers;
    bool scalar;  // scalar loads return in any order
  };
  std::deque<Entry> entries;
  RegisterSet pending;
  void push(const RegisterSet& registers, bool scalar);
  void wait(size_t left);
};

enum Touch { kReads, kWrites, kAdds };  // kAdds: an atomic

// Who last touched a byte of LDS in each way: the number of barriers passed << 8 | wave, or 255 for several waves.
struct Touched {
  uint32_t by[3] = {0, 0, 0};
};

// A work group while it runs, on one host thread.
struct Group {
  const Kernel* kernel = nullptr;
  std::vector<uint8_t> lds;
  std::vector<Region> regions;  // sorted
  Region last{1, 0, false};     // where the last access was
  uint32_t id[3] = {0, 0, 0};
  uint64_t* times = nullptr;       // [instructions] how often each ran
  uint64_t* lanes = nullptr;       // [instructions] lanes of memory instructions
  uint64_t* misaligned = nullptr;  // [instructions] of those, the misaligned
  bool check_waits = true;
  bool check_alignment = false;
  std::vector<Touched> touched;  // [bytes of LDS] where races are looked for, else empty
  uint32_t phase = 1;            // barriers passed, of all groups that ran here

  // The host's address of `bytes` at a device address; a fault where no allocation is.
  uint8_t* global(uint64_t address, uint32_t bytes, bool write) {
    if (address < last.begin || address + bytes > last.end || (write && !last.writable)) find(address, bytes, write);
    return reinterpret_cast<uint8_t*>(address);
  }
  uint8_t* shared(uint32_t wave, uint32_t address, uint32_t bytes, Touch touch) {
    if (uint64_t{address} + bytes > lds.size()) {
      fault("LDS access at ", std::to_string(address), " of ", std::to_string(bytes), " bytes, the work group has ",
            std::to_string(lds.size()));
    }
    if (!touched.empty()) check_race(wave, address, bytes, touch);
    return lds.data() + address;
  }
  void find(uint64_t address, uint32_t bytes, bool write);
  void check_race(uint32_t wave, uint32_t address, uint32_t bytes, Touch touch);
};

struct Wave {
  enum State { kRunning, kAtBarrier, kEnded };
  alignas(64) uint32_t v[257][kLanes];  // the last one is DPP's operand
  uint32_t s[128];                      // with VCC, M0 and EXEC at their encodings
  bool scc = false;
  uint32_t pc = 0;  // index of the next instruction
  uint32_t at = 0;  // and of this one
  State state = kRunning;
  uint64_t fuel = 0;
  Group* group = nullptr;
  uint32_t number = 0;
  Outstanding vector_loads, other_loads;          // vmcnt; lgkmcnt
  bool outstanding = false;                       // either has entries
  bool flat_shared = false, flat_global = false;  // what the flat access touched

  uint32_t exec() const { return s[kExec]; }
  uint64_t pair(int r) const { return s[r] | uint64_t{s[r + 1]} << 32; }
};

// A kernel's code and what its descriptor and metadata say.
struct Kernel {
  struct Argument {
    uint32_t offset, size;
    std::string kind;
  };
  std::string name;         // mangled
  uint64_t descriptor = 0;  // address in the code object
  uint64_t entry = 0;
  uint32_t lds = 0, scratch = 0, argument_bytes = 0, rsrc1 = 0, rsrc2 = 0, vgprs = 0, max_threads = 1024;
  uint16_t properties = 0;
  std::vector<Argument> arguments;
  std::vector<Instruction> code;  // empty until the first launch
  uint64_t image = 0;             // host address of the loaded code object's address 0
  uint64_t launches = 0;
  std::vector<uint64_t> times, lanes, misaligned;  // [instructions]

  uint32_t index_of(uint64_t address) const;  // faults when no instruction is there
};

}  // namespace rdna
