// Scalar loads, global, flat and LDS memory, atomics. A load writes its registers when it is executed; that the code
// waits before it reads them is checked by the wave's counters.

#include <bit>

#include "operands.h"

namespace rdna {
namespace {

enum class Space { kGlobal, kFlat, kShared };

// What lane l of a vector memory instruction accesses.
struct Access {
  Wave& w;
  const Instruction& in;
  const Operand& base;  // the address
  const Operand* scalar;

  template <Space kSpace>
  uint8_t* at(int l, uint32_t bytes, Touch touch, int32_t offset) const {
    uint64_t address;
    try {
      if constexpr (kSpace == Space::kShared) {
        address = w.v[base.reg][l] + static_cast<uint32_t>(offset);
        align(address, bytes, std::min(bytes, 16u));
        return w.group->shared(w.number, static_cast<uint32_t>(address), bytes, touch);
      } else {
        address = scalar != nullptr ? scalar64(w, *scalar) + w.v[base.reg][l]
                                    : w.v[base.reg][l] | uint64_t{w.v[base.reg + 1][l]} << 32;
        address += static_cast<uint64_t>(static_cast<int64_t>(offset));
        align(address, bytes, std::min(bytes, 4u));
        if constexpr (kSpace == Space::kFlat) {
          if (address >> 32 == kPrivateAperture) fault("scratch memory is not modelled");
          if (address >> 32 == kSharedAperture) {
            w.flat_shared = true;
            return w.group->shared(w.number, static_cast<uint32_t>(address), bytes, touch);
          }
        }
        w.flat_global = true;
        return w.group->global(address, bytes, touch != kReads);
      }
    } catch (const Fault& f) {
      fault("lane ", std::to_string(l), ": ", f.what());
    }
  }
  // ROCm runs with unaligned access allowed, and the compiler joins narrow accesses: it is counted, or a fault on
  // demand.
  void align(uint64_t address, uint32_t bytes, uint32_t to) const {
    if (to <= 1 || address % std::bit_ceil(to) == 0) return;
    w.group->misaligned[in.index]++;
    if (w.group->check_alignment) {
      fault("address ", hex(address), " of ", std::to_string(bytes), " bytes is not aligned to ",
            std::to_string(std::bit_ceil(to)));
    }
  }
  template <typename F>
  void each_lane(F f) const {
    const uint32_t exec = w.exec();
    w.group->lanes[in.index] += static_cast<uint64_t>(std::popcount(exec));
    for (uint32_t left = exec; left != 0; left &= left - 1) f(std::countr_zero(left));
  }
};

// `k`: the operand that is the scalar base of a global access, or off.
Access access_of(Wave& w, const Instruction& in, int k) {
  const Operand& s = in.src[k];
  return {w, in, in.src[0], s.kind == Operand::kScalar ? &s : nullptr};
}

enum class Extend { kNone, kZero, kSign };

template <Space kSpace, int kBytes, Extend kExtend = Extend::kNone>
void load(Wave& w, const Instruction& in) {
  constexpr int kWords = (kBytes + 3) / 4;
  const Access access = access_of(w, in, 1);
  uint32_t r[kWords][kLanes];
  access.each_lane([&](int l) {
    const uint8_t* p = access.at<kSpace>(l, kBytes, kReads, in.offset);
    uint32_t words[kWords] = {};
    std::memcpy(words, p, kBytes);
    if (kExtend == Extend::kSign) {
      words[0] =
          static_cast<uint32_t>(static_cast<int32_t>(words[0] << (32 - 8 * kBytes % 32)) >> (32 - 8 * kBytes % 32));
    }
    for (int i = 0; i < kWords; i++) r[i][l] = words[i];
  });
  for (int i = 0; i < kWords; i++) store32(w, in.dst.reg + i, r[i], w.exec());
}

template <Space kSpace, int kBytes, bool kSigned, bool kHigh>
void load_half(Wave& w, const Instruction& in) {  // d16: one half of the register
  const Access access = access_of(w, in, 1);
  access.each_lane([&](int l) {
    uint16_t h = 0;
    std::memcpy(&h, access.at<kSpace>(l, kBytes, kReads, in.offset), kBytes);
    if (kSigned) h = static_cast<uint16_t>(static_cast<int8_t>(h));
    uint32_t& d = w.v[in.dst.reg][l];
    d = kHigh ? (d & 0xffff) | uint32_t{h} << 16 : (d & 0xffff0000) | h;
  });
}

template <Space kSpace, int kBytes, int kShift = 0>
void store_to(Wave& w, const Instruction& in) {
  const Access access = access_of(w, in, 2);
  access.each_lane([&](int l) {
    uint32_t words[(kBytes + 3) / 4];
    for (int i = 0; i < (kBytes + 3) / 4; i++) words[i] = w.v[in.src[1].reg + i][l] >> kShift;
    std::memcpy(access.at<kSpace>(l, kBytes, kWrites, in.offset), words, kBytes);
  });
}

// Two accesses of kBytes; their offsets count units of kBytes * kStride.
template <int kBytes, int kStride>
void load_two(Wave& w, const Instruction& in) {
  constexpr int kWords = kBytes / 4;
  const Access access{w, in, in.src[0], nullptr};
  uint32_t r[2 * kWords][kLanes];
  access.each_lane([&](int l) {
    for (int i = 0; i < 2; i++) {
      uint32_t words[kWords];
      std::memcpy(words, access.at<Space::kShared>(l, kBytes, kReads, (i ? in.offset1 : in.offset) * kBytes * kStride),
                  kBytes);
      for (int k = 0; k < kWords; k++) r[i * kWords + k][l] = words[k];
    }
  });
  for (int i = 0; i < 2 * kWords; i++) store32(w, in.dst.reg + i, r[i], w.exec());
}

template <int kBytes, int kStride>
void store_two(Wave& w, const Instruction& in) {
  const Access access{w, in, in.src[0], nullptr};
  access.each_lane([&](int l) {
    for (int i = 0; i < 2; i++) {
      uint32_t words[kBytes / 4];
      for (int k = 0; k < kBytes / 4; k++) words[k] = w.v[in.src[1 + i].reg + k][l];
      std::memcpy(access.at<Space::kShared>(l, kBytes, kWrites, (i ? in.offset1 : in.offset) * kBytes * kStride), words,
                  kBytes);
    }
  });
}

// Fn(old, operand) -> new. Groups run on several host threads, so these are atomic there too.
template <Space kSpace, typename T, auto Fn>
void atomic(Wave& w, const Instruction& in) {
  const bool returns = in.dst.kind == Operand::kVector;
  const Access access = access_of(w, in, 2);
  constexpr int kWords = sizeof(T) / 4;
  access.each_lane([&](int l) {
    using B = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    B bits = w.v[in.src[1].reg][l];
    if constexpr (kWords == 2) bits |= uint64_t{w.v[in.src[1].reg + 1][l]} << 32;
    auto* p = reinterpret_cast<B*>(access.at<kSpace>(l, sizeof(T), kAdds, in.offset));
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fault("atomic at an address that is not aligned");
    B old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(
        p, &old, std::bit_cast<B>(static_cast<T>(Fn(std::bit_cast<T>(old), std::bit_cast<T>(bits)))), false,
        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    if (returns) {
      w.v[in.dst.reg][l] = static_cast<uint32_t>(old);
      if constexpr (kWords == 2) w.v[in.dst.reg + 1][l] = static_cast<uint32_t>(old >> 32);
    }
  });
}

template <Space kSpace>
void compare_swap(Wave& w, const Instruction& in) {  // data: the new value, then what is compared with
  const bool returns = in.dst.kind == Operand::kVector;
  const Access access = access_of(w, in, 2);
  access.each_lane([&](int l) {
    auto* p = reinterpret_cast<uint32_t*>(access.at<kSpace>(l, 4, kAdds, in.offset));
    uint32_t old = w.v[in.src[1].reg + 1][l];
    __atomic_compare_exchange_n(p, &old, w.v[in.src[1].reg][l], false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    if (returns) w.v[in.dst.reg][l] = old;
  });
}

void scalar_load(Wave& w, const Instruction& in) {
  uint64_t address = scalar64(w, in.src[0]) + static_cast<uint64_t>(static_cast<int64_t>(in.offset));
  address += in.src[1].kind == Operand::kConstant
                 ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(in.src[1].value)))
                 : scalar32(w, in.src[1]);
  address &= ~uint64_t{3};
  const uint32_t bytes = in.dst.count * 4u;
  std::memcpy(&w.s[in.dst.reg], w.group->global(address, bytes, false), bytes);
}

Operation operation(Run run, Class klass, int results, size_t sources) {
  Operation op;
  op.run = run;
  op.klass = klass;
  op.results = results;
  op.types.assign(sources, Type::kU32);
  return op;
}

template <Space kSpace>
void add_loads(Operations& t, const std::string& prefix) {
  const size_t n = kSpace == Space::kGlobal ? 2 : 1;  // a scalar base, or off
  const Class klass = kSpace == Space::kShared ? Class::kLds : Class::kLoad,
              out = kSpace == Space::kShared ? Class::kLds : Class::kStore;
  const auto add = [&](const char* name, Run run) { t.add(prefix + "load_" + name, operation(run, klass, 1, n)); };
  add("u8", load<kSpace, 1, Extend::kZero>);
  add("i8", load<kSpace, 1, Extend::kSign>);
  add("u16", load<kSpace, 2, Extend::kZero>);
  add("i16", load<kSpace, 2, Extend::kSign>);
  add("b32", load<kSpace, 4>);
  add("b64", load<kSpace, 8>);
  add("b96", load<kSpace, 12>);
  add("b128", load<kSpace, 16>);
  const std::string u8 = kSpace == Space::kShared ? "u8_d16" : "d16_u8",
                    i8 = kSpace == Space::kShared ? "i8_d16" : "d16_i8",
                    b16 = kSpace == Space::kShared ? "u16_d16" : "d16_b16";
  const auto high = [](std::string s) { return s.find("d16_") == 0 ? "d16_hi_" + s.substr(4) : s + "_hi"; };
  add(u8.c_str(), load_half<kSpace, 1, false, false>);
  add(i8.c_str(), load_half<kSpace, 1, true, false>);
  add(b16.c_str(), load_half<kSpace, 2, false, false>);
  add(high(u8).c_str(), load_half<kSpace, 1, false, true>);
  add(high(i8).c_str(), load_half<kSpace, 1, true, true>);
  add(high(b16).c_str(), load_half<kSpace, 2, false, true>);
  const auto store = [&](const std::string& name, Run run) {
    t.add(prefix + "store_" + name, operation(run, out, 0, n + 1));
  };
  store("b8", store_to<kSpace, 1>);
  store("b16", store_to<kSpace, 2>);
  store("b32", store_to<kSpace, 4>);
  store("b64", store_to<kSpace, 8>);
  store("b96", store_to<kSpace, 12>);
  store("b128", store_to<kSpace, 16>);
  store(high(kSpace == Space::kShared ? "b8_d16" : "d16_b8"), store_to<kSpace, 1, 16>);
  store(high(kSpace == Space::kShared ? "b16_d16" : "d16_b16"), store_to<kSpace, 2, 16>);
}

using u = uint32_t;
using ul = uint64_t;

template <Space kSpace, typename T, auto Fn>
void add_atomic(Operations& t, const std::string& name) {
  const Run run = atomic<kSpace, T, Fn>;
  if (kSpace == Space::kShared) {
    t.add("ds_" + name, operation(run, Class::kLds, 0, 2));
    const size_t at = name.rfind('_');
    t.add("ds_" + name.substr(0, at) + "_rtn" + name.substr(at), operation(run, Class::kLds, 1, 2));
  } else {  // the decoder adds the result where the instruction returns the old value
    t.add((kSpace == Space::kGlobal ? "global_atomic_" : "flat_atomic_") + name,
          operation(run, Class::kAtomic, 0, kSpace == Space::kGlobal ? 3 : 2));
  }
}

template <Space kSpace, typename T>
void add_atomics_of(Operations& t, const std::string& bits) {
  using S = std::make_signed_t<T>;
  add_atomic<kSpace, T, [](T a, T b) { return a + b; }>(t, "add_u" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return a - b; }>(t, "sub_u" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return a < b ? a : b; }>(t, "min_u" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return (a > b ? a : b); }>(t, "max_u" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return static_cast<S>(a) < static_cast<S>(b) ? a : b; }>(t, "min_i" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return (static_cast<S>(a) > static_cast<S>(b) ? a : b); }>(t, "max_i" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return a & b; }>(t, "and_b" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return a | b; }>(t, "or_b" + bits);
  add_atomic<kSpace, T, [](T a, T b) { return a ^ b; }>(t, "xor_b" + bits);
}

template <Space kSpace>
void add_atomics(Operations& t) {
  add_atomics_of<kSpace, uint32_t>(t, "32");
  add_atomics_of<kSpace, uint64_t>(t, "64");
  add_atomic<kSpace, float, [](float a, float b) { return a + b; }>(t, "add_f32");
  if (kSpace == Space::kShared) {
    t.add("ds_storexchg_rtn_b32", operation(atomic<kSpace, u, [](u, u b) { return b; }>, Class::kLds, 1, 2));
    t.add("ds_storexchg_rtn_b64", operation(atomic<kSpace, ul, [](ul, ul b) { return b; }>, Class::kLds, 1, 2));
  } else {
    add_atomic<kSpace, u, [](u, u b) { return b; }>(t, "swap_b32");
    add_atomic<kSpace, ul, [](ul, ul b) { return b; }>(t, "swap_b64");
    t.add(kSpace == Space::kGlobal ? "global_atomic_cmpswap_b32" : "flat_atomic_cmpswap_b32",
          operation(compare_swap<kSpace>, Class::kAtomic, 0, kSpace == Space::kGlobal ? 3 : 2));
  }
}

}  // namespace

void add_memory(Operations& t) {
  add_loads<Space::kGlobal>(t, "global_");
  add_loads<Space::kFlat>(t, "flat_");
  add_loads<Space::kShared>(t, "ds_");
  add_atomics<Space::kGlobal>(t);
  add_atomics<Space::kFlat>(t);
  add_atomics<Space::kShared>(t);
  const auto two = [&t](const char* name, Run in, Run out) {
    t.add(std::string("ds_load_2addr_") + name, operation(in, Class::kLds, 1, 1));
    t.add(std::string("ds_store_2addr_") + name, operation(out, Class::kLds, 0, 3));
  };
  two("b32", load_two<4, 1>, store_two<4, 1>);
  two("b64", load_two<8, 1>, store_two<8, 1>);
  two("stride64_b32", load_two<4, 64>, store_two<4, 64>);
  two("stride64_b64", load_two<8, 64>, store_two<8, 64>);
  for (const char* bits : {"32", "64", "128", "256", "512"}) {
    t.add(std::string("s_load_b") + bits, operation(scalar_load, Class::kScalarLoad, 1, 2));
  }
}

}  // namespace rdna
