#pragma once
// Reading and writing operands of vector instructions, 32 lanes at once, by the type the instruction gives them.

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "machine.h"

namespace rdna {

enum class Type : uint8_t { kF32, kF64, kF16, kU32, kI32, kU64, kI64, kU16, kI16, kMask };

// Operand types. C: what a lane computes with. 16-bit results leave the upper half of their register alone.
template <Type type, typename Lane>
struct OperandType {
  static constexpr Type kType = type;
  using C = Lane;
};
using F32 = OperandType<Type::kF32, float>;
using F64 = OperandType<Type::kF64, double>;
using F16 =
    OperandType<Type::kF16, float>;  // every half is a float; one operation of two floats rounds to half as it should
using U32 = OperandType<Type::kU32, uint32_t>;
using I32 = OperandType<Type::kI32, int32_t>;
using U64 = OperandType<Type::kU64, uint64_t>;
using I64 = OperandType<Type::kI64, int64_t>;
using U16 = OperandType<Type::kU16, uint32_t>;
using I16 = OperandType<Type::kI16, int32_t>;
using Mask = OperandType<Type::kMask, uint32_t>;  // a lane mask in an SGPR, 0 or 1 for a lane

template <typename T>
inline constexpr bool kWide = sizeof(typename T::C) == 8;
template <typename T>
inline constexpr bool kHalf = std::is_same_v<T, F16> || std::is_same_v<T, U16> || std::is_same_v<T, I16>;
template <typename T>
inline constexpr bool kReal = std::is_floating_point_v<typename T::C>;

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

inline uint32_t scalar32(const Wave& w, const Operand& o) {
  if (o.kind == Operand::kConstant) return static_cast<uint32_t>(o.value);
  if (o.reg == kScc) return w.scc;
  return o.reg == kNull ? 0 : w.s[o.reg];
}
inline uint64_t scalar64(const Wave& w, const Operand& o) {
  if (o.kind == Operand::kConstant) return o.value;
  return o.reg == kNull ? 0 : w.pair(o.reg);
}
inline void set_scalar32(Wave& w, const Operand& o, uint32_t v) {
  if (o.reg != kNull) w.s[o.reg] = v;
}
inline void set_scalar64(Wave& w, const Operand& o, uint64_t v) {
  if (o.reg == kNull) return;
  w.s[o.reg] = static_cast<uint32_t>(v);
  w.s[o.reg + 1] = static_cast<uint32_t>(v >> 32);
}

template <typename T>
typename T::C of_bits(uint64_t bits) {
  typename T::C v;
  if constexpr (std::is_same_v<T, F16>) {
    v = half_to_float(static_cast<uint16_t>(bits));
  } else if constexpr (std::is_same_v<T, U16>) {
    v = static_cast<uint16_t>(bits);
  } else if constexpr (std::is_same_v<T, I16>) {
    v = static_cast<int16_t>(bits);
  } else {
    std::memcpy(&v, &bits, sizeof v);
  }
  return v;
}

// The lanes of operand k; `room` is used where they do not lie in a register as they are.
template <typename T>
const typename T::C* fetch(const Wave& w, const Instruction& in, int k, typename T::C* room) {
  using C = typename T::C;
  const Operand& o = in.src[k];
  if constexpr (std::is_same_v<T, Mask>) {
    const uint32_t mask = scalar32(w, o);
    for (int l = 0; l < kLanes; l++) room[l] = mask >> l & 1;
    return room;
  }
  if (o.kind == Operand::kVector) {
    const uint32_t* low = w.v[o.reg];
    if constexpr (kWide<T>) {
      const uint32_t* high = w.v[o.reg + 1];
      uint64_t bits[kLanes];
      for (int l = 0; l < kLanes; l++) bits[l] = low[l] | uint64_t{high[l]} << 32;
      std::memcpy(room, bits, sizeof bits);
    } else if constexpr (kHalf<T>) {
      const int shift = in.op_sel >> k & 1 ? 16 : 0;
      for (int l = 0; l < kLanes; l++) room[l] = of_bits<T>(low[l] >> shift);
    } else {
      if (!o.neg && !o.abs) return reinterpret_cast<const C*>(low);
      std::memcpy(room, low, sizeof(C) * kLanes);
    }
  } else {
    const uint64_t bits = kWide<T> ? scalar64(w, o) : scalar32(w, o);
    const C v = of_bits<T>(kHalf<T> && in.op_sel >> k & 1 ? bits >> 16 : bits);
    for (int l = 0; l < kLanes; l++) room[l] = v;
  }
  if constexpr (kReal<T>) {
    if (o.abs) {
      for (int l = 0; l < kLanes; l++) room[l] = std::fabs(room[l]);
    }
    if (o.neg) {
      for (int l = 0; l < kLanes; l++) room[l] = -room[l];
    }
  }
  return room;
}

inline void store32(Wave& w, int reg, const uint32_t* r, uint32_t lanes) {
  uint32_t* d = w.v[reg];
  if (lanes == kAll) {
    std::memcpy(d, r, sizeof(uint32_t) * kLanes);
    return;
  }
  for (int l = 0; l < kLanes; l++) d[l] = lanes >> l & 1 ? r[l] : d[l];
}

template <typename T>
void store(Wave& w, const Instruction& in, const Operand& o, const typename T::C* r) {
  const uint32_t lanes = w.exec();
  if constexpr (std::is_same_v<T, Mask>) {
    uint32_t mask = 0;
    for (int l = 0; l < kLanes; l++) mask |= (r[l] & 1) << l;
    set_scalar32(w, o, mask & lanes);  // inactive lanes write 0
  } else if constexpr (kWide<T>) {
    uint64_t bits[kLanes];
    std::memcpy(bits, r, sizeof bits);
    uint32_t part[kLanes];
    for (int half = 0; half < 2; half++) {
      for (int l = 0; l < kLanes; l++) part[l] = static_cast<uint32_t>(bits[l] >> (32 * half));
      store32(w, o.reg + half, part, lanes);
    }
  } else if constexpr (kHalf<T>) {
    uint32_t merged[kLanes];
    const bool high = in.op_sel >> 3 & 1;
    for (int l = 0; l < kLanes; l++) {
      uint32_t h;
      if constexpr (std::is_same_v<T, F16>) {
        h = float_to_half(r[l]);
      } else {
        h = static_cast<uint16_t>(r[l]);
      }
      const uint32_t old = w.v[o.reg][l];
      merged[l] = high ? (old & 0xffff) | h << 16 : (old & 0xffff0000) | h;
    }
    store32(w, o.reg, merged, lanes);
  } else {
    uint32_t bits[kLanes];
    std::memcpy(bits, r, sizeof bits);
    store32(w, o.reg, bits, lanes);
  }
}

// An instruction of one result that computes lane by lane: Fn(S::C...) -> D::C.
template <auto Fn, typename D, typename... S>
void by_lane(Wave& w, const Instruction& in) {
  [&]<size_t... k>(std::index_sequence<k...>) {
    alignas(64) typename D::C r[kLanes];
    // one buffer an operand, of the widest type
    alignas(64) uint64_t room[sizeof...(S) + 1][kLanes];
    auto sources = std::make_tuple(fetch<S>(w, in, static_cast<int>(k), reinterpret_cast<typename S::C*>(room[k]))...);
    for (int l = 0; l < kLanes; l++) r[l] = static_cast<typename D::C>(Fn(std::get<k>(sources)[l]...));
    if constexpr (kReal<D>) {
      if (in.clamp) {
        for (int l = 0; l < kLanes; l++) r[l] = r[l] > 0 ? (r[l] < 1 ? r[l] : 1) : 0;
      }
    }
    store<D>(w, in, in.dst, r);
  }(std::make_index_sequence<sizeof...(S)>());
}

// An entry of the table of instructions.
struct Operation {
  Run run = nullptr;
  Class klass = Class::kOther;
  int results = 1;                 // operands at the front that are written
  std::vector<Type> types;         // of the sources: how their constants read
  bool reads_result = false;       // v_fmac: the result is the last source
  uint16_t reads = 0, writes = 0;  // scalar registers that are not written out (VCC); 0: none
  bool clamps = false;             // the handler knows `clamp`
};

class Operations {
 public:
  Operations();
  const Operation* find(const std::string& name) const;
  void add(const std::string& name, Operation op);

 private:
  std::vector<std::pair<std::string, Operation>> sorted_;
};

void add_scalar(Operations& t);
void add_integer(Operations& t);
void add_float(Operations& t);
void add_compare(Operations& t);
void add_lane(Operations& t);
void add_matrix(Operations& t);
void add_memory(Operations& t);

void run_dpp(Wave& w, const Instruction& in);

// Registers an instruction that computes lane by lane.
template <auto Fn, typename D, typename... S>
void add_vector(Operations& t, const char* name, Class klass = Class::kValu) {
  Operation op;
  op.run = by_lane<Fn, D, S...>;
  op.klass = klass;
  op.types = {S::kType...};
  op.clamps = kReal<D>;
  t.add(name, std::move(op));
}

}  // namespace rdna
