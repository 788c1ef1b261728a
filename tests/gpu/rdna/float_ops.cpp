// Vector instructions of floats. Rounding is to nearest even and denormals are kept, the mode kernels are compiled for
// (checked at the launch). Square roots, reciprocals and exponentials are within 1 ulp on hardware and flush denormals;
// here they round as well as a double does, with the flush.

#include <bit>
#include <cmath>
#include <limits>

#include "operands.h"

namespace rdna {
namespace {

using u = uint32_t;
using i = int32_t;
using ul = uint64_t;

template <typename F>
using BitsOf = std::conditional_t<sizeof(F) == 8, uint64_t, uint32_t>;
template <typename F>
BitsOf<F> bits(F v) {
  return std::bit_cast<BitsOf<F>>(v);
}
template <typename F>
F quiet(F v) {
  return std::bit_cast<F>(bits(v) | BitsOf<F>{1} << (std::numeric_limits<F>::digits - 2));
}
template <typename F>
int exponent(F v) {  // biased
  constexpr int mantissa = std::numeric_limits<F>::digits - 1;
  return static_cast<int>(bits(v) >> mantissa) & (sizeof(F) == 8 ? 2047 : 255);
}
template <typename F>
bool denormal(F v) {
  return exponent(v) == 0 && v != 0;
}

float flush(float v) { return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v; }

// +0 is more than -0, and a number wins over NaN.
template <typename F>
F max_of(F a, F b) {
  if (a != a) return b != b ? quiet(a) : b;
  if (b != b) return a;
  if (a == b) return std::bit_cast<F>(bits(a) & bits(b));
  return a > b ? a : b;
}
template <typename F>
F min_of(F a, F b) {
  if (a != a) return b != b ? quiet(a) : b;
  if (b != b) return a;
  if (a == b) return std::bit_cast<F>(bits(a) | bits(b));
  return a < b ? a : b;
}
float med3(float a, float b, float c) {
  if (a != a || b != b || c != c) return min_of(min_of(a, b), c);
  const float most = max_of(max_of(a, b), c);
  return most == a ? max_of(b, c) : most == b ? max_of(a, c) : max_of(a, b);
}

template <typename To, typename From>
To to_int(From v) {  // towards zero, saturating, NaN gives 0
  if (v != v) return 0;
  if (std::trunc(v) >= std::ldexp(static_cast<From>(1), std::numeric_limits<To>::digits))
    return std::numeric_limits<To>::max();
  if (v <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  return static_cast<To>(v);
}

// Scales an operand of a division away from overflow and underflow: see V_DIV_SCALE_F32 and _F64 in AMD's guide.
// scaled: whether v_div_fmas has to scale back.
template <typename F>
F div_scale(F s0, F s1, F s2, bool* scaled) {
  constexpr bool wide = sizeof(F) == 8;
  constexpr int up = wide ? 128 : 64;
  const double inverse = 1.0 / static_cast<double>(s1);
  const F quotient = s2 / s1;
  // 1/s1 underflows in the type it is computed in
  const bool small_inverse = wide ? denormal(inverse) : denormal(static_cast<float>(inverse));
  *scaled = false;
  if (s2 == 0 || s1 == 0) return std::numeric_limits<F>::quiet_NaN();
  if (exponent(s2) - exponent(s1) >= (wide ? 768 : 96)) {
    *scaled = true;
    return s0 == s1 ? std::ldexp(s0, up) : s0;
  }
  if (denormal(s1)) return std::ldexp(s0, up);
  if (small_inverse && denormal(quotient)) {  // AMD's text scales up here, which overflows
    *scaled = true;
    return s0 == s1 ? std::ldexp(s0, -up) : s0;
  }
  if (small_inverse) return std::ldexp(s0, -up);
  if (denormal(quotient)) {
    *scaled = true;
    return s0 == s2 ? std::ldexp(s0, up) : s0;
  }
  if (exponent(s2) <= (wide ? 53 : 23)) return std::ldexp(s0, up);
  return s0;
}

template <typename T>
void div_scale_op(Wave& w, const Instruction& in) {
  using C = typename T::C;
  alignas(64) C room[3][kLanes], r[kLanes];
  u flags[kLanes];
  const C* a = fetch<T>(w, in, 0, room[0]);
  const C* b = fetch<T>(w, in, 1, room[1]);
  const C* c = fetch<T>(w, in, 2, room[2]);
  for (int l = 0; l < kLanes; l++) {
    bool scaled;
    r[l] = div_scale(a[l], b[l], c[l], &scaled);
    flags[l] = scaled;
  }
  store<T>(w, in, in.dst, r);
  store<Mask>(w, in, in.dst2, flags);
}

template <typename F>
F div_fixup(F s0, F s1, F s2) {
  constexpr bool wide = sizeof(F) == 8;
  const bool negative = std::signbit(s1) != std::signbit(s2);
  const F inf = std::numeric_limits<F>::infinity();
  const auto with_sign = [&](F v) { return negative ? -v : v; };
  if (s2 != s2) return quiet(s2);
  if (s1 != s1) return quiet(s1);
  if ((s1 == 0 && s2 == 0) || (std::isinf(s1) && std::isinf(s2))) return -std::numeric_limits<F>::quiet_NaN();
  if (s1 == 0 || std::isinf(s2)) return with_sign(inf);
  if (std::isinf(s1) || s2 == 0) return with_sign(0);
  if (exponent(s2) - exponent(s1) < (wide ? -1075 : -150)) return with_sign(0);  // below the least denormal
  if (s0 != s0)
    return with_sign(inf);  // the steps overflowed; not in AMD's text, but without it such quotients were NaN
  return with_sign(std::fabs(s0));
}

// The last step of a division, and back from v_div_scale's scale, rounded once. AMD's text has one factor, 2^32 or
// 2^64, for what v_div_scale does to a numerator and for what it does to a denominator, with which neither division
// comes out; the quotient (s2) tells which it was.
template <typename F>
F div_fmas(F s0, F s1, F s2, u scaled) {
  constexpr int back = sizeof(F) == 8 ? 128 : 64;
  if (!scaled) return std::fma(s0, s1, s2);
  if (std::fabs(s2) >= 2) return std::ldexp(std::fma(s0, s1, s2), back);
  using Wider = std::conditional_t<sizeof(F) == 8, long double, double>;
  const Wider sum = std::fma(static_cast<Wider>(s0), static_cast<Wider>(s1), static_cast<Wider>(s2));
  return static_cast<F>(std::ldexp(sum, -back));
}

template <typename T>
void add_division(Operations& t, const std::string& suffix, Class klass) {
  constexpr Type type = T::kType;
  t.add("v_div_scale_" + suffix, {div_scale_op<T>, klass, 2, {type, type, type}});
  add_vector<[](typename T::C a, typename T::C b, typename T::C c) { return div_fixup(a, b, c); }, T, T, T, T>(
      t, ("v_div_fixup_" + suffix).c_str(), klass);
  Operation fmas;
  fmas.run = by_lane<div_fmas<typename T::C>, T, T, T, T, Mask>;
  fmas.klass = klass;
  fmas.types = {type, type, type, Type::kMask};
  fmas.reads = kVcc;
  t.add("v_div_fmas_" + suffix, fmas);
}

template <auto Fn>
void add_accumulate(Operations& t, const char* name) {  // the result is the third source
  Operation op;
  op.run = by_lane<Fn, F32, F32, F32, F32>;
  op.klass = Class::kValu;
  op.types = {Type::kF32, Type::kF32, Type::kF32};
  op.reads_result = true;
  op.clamps = true;
  t.add(name, op);
}

// v_fma_mix: each operand a float, or a half of a register; neg_hi is its absolute value, neg_lo its sign.
template <int kPart>  // 0: a float result, 1: the low half, 2: the high half
void fma_mix(Wave& w, const Instruction& in) {
  float x[3][kLanes], r[kLanes];
  for (int k = 0; k < 3; k++) {
    u room[kLanes];
    Operand o = in.src[k];
    const u* p = room;
    if (o.kind == Operand::kVector) {
      p = w.v[o.reg];
    } else {
      const u v = scalar32(w, o);
      for (int l = 0; l < kLanes; l++) room[l] = v;
    }
    if (in.op_sel_hi >> k & 1) {
      if (o.is_float) fault("v_fma_mix with a constant as half is not modelled");
      const int shift = in.op_sel >> k & 1 ? 16 : 0;
      for (int l = 0; l < kLanes; l += 8) {
        const __m256i words = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + l)), shift);
        const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
        _mm256_storeu_ps(x[k] + l, _mm256_cvtph_ps(_mm256_castsi256_si128(packed)));
      }
    } else {
      std::memcpy(x[k], p, sizeof x[k]);
    }
    if (in.neg_hi >> k & 1 || o.abs) {
      for (float& v : x[k]) v = std::fabs(v);
    }
    if (in.neg_lo >> k & 1 || o.neg) {
      for (float& v : x[k]) v = -v;
    }
  }
  for (int l = 0; l < kLanes; l++) r[l] = std::fma(x[0][l], x[1][l], x[2][l]);
  if (in.clamp) {
    for (float& v : r) v = v > 0 ? (v < 1 ? v : 1) : 0;
  }
  if constexpr (kPart == 0) {
    store<F32>(w, in, in.dst, r);
  } else {
    u merged[kLanes];
    for (int l = 0; l < kLanes; l++) {
      const u h = float_to_half(r[l]), old = w.v[in.dst.reg][l];
      merged[l] = kPart == 2 ? (old & 0xffff) | h << 16 : (old & 0xffff0000) | h;
    }
    store32(w, in.dst.reg, merged, w.exec());
  }
}

// Packed halves. A sum or product of two halves is exact enough in float that rounding twice is rounding once; of the
// fused one in double.
template <auto Fn, int kSources>
void packed_half(Wave& w, const Instruction& in) {
  u room[3][kLanes], r[kLanes];
  const u* s[3] = {};
  for (int k = 0; k < kSources; k++) s[k] = fetch<U32>(w, in, k, room[k]);
  for (int l = 0; l < kLanes; l++) {
    float low[3] = {}, high[3] = {};
    for (int k = 0; k < kSources; k++) {
      low[k] = half_to_float(static_cast<uint16_t>(s[k][l] >> (in.op_sel >> k & 1 ? 16 : 0)));
      high[k] = half_to_float(static_cast<uint16_t>(s[k][l] >> (in.op_sel_hi >> k & 1 ? 16 : 0)));
      if (in.neg_lo >> k & 1) low[k] = -low[k];
      if (in.neg_hi >> k & 1) high[k] = -high[k];
    }
    const u a = std::bit_cast<uint16_t>(static_cast<_Float16>(Fn(low[0], low[1], low[2])));
    const u b = std::bit_cast<uint16_t>(static_cast<_Float16>(Fn(high[0], high[1], high[2])));
    r[l] = a | b << 16;
  }
  if (in.clamp) fault("packed halves with clamp are not modelled");
  store<U32>(w, in, in.dst, r);
}

template <auto Fn, int kSources>
void add_packed(Operations& t, const char* name) {
  Operation op;
  op.run = packed_half<Fn, kSources>;
  op.klass = Class::kPacked;
  op.types.assign(kSources, Type::kF16);
  t.add(name, op);
}

u round_to_zero_half(float v) { return _cvtss_sh(v, _MM_FROUND_TO_ZERO); }

void pack_half(Wave& w, const Instruction& in) {  // v_pack_b32_f16: moves bits, may negate
  u room[2][kLanes], r[kLanes];
  const u* s[2];
  u flip[2];
  for (int k = 0; k < 2; k++) {
    s[k] = fetch<U32>(w, in, k, room[k]);
    if (in.src[k].abs) fault("v_pack_b32_f16 with |x| is not modelled");
    flip[k] = in.src[k].neg ? 0x8000 : 0;
  }
  for (int l = 0; l < kLanes; l++) {
    const u a = (s[0][l] >> (in.op_sel & 1 ? 16 : 0) & 0xffff) ^ flip[0];
    const u b = (s[1][l] >> (in.op_sel & 2 ? 16 : 0) & 0xffff) ^ flip[1];
    r[l] = a | b << 16;
  }
  store<U32>(w, in, in.dst, r);
}

void add_single(Operations& t) {
  constexpr Class special = Class::kTranscendental;
  add_vector<[](float a, float b) { return a + b; }, F32, F32, F32>(t, "v_add_f32");
  add_vector<[](float a, float b) { return a - b; }, F32, F32, F32>(t, "v_sub_f32");
  add_vector<[](float a, float b) { return b - a; }, F32, F32, F32>(t, "v_subrev_f32");
  add_vector<[](float a, float b) { return a * b; }, F32, F32, F32>(t, "v_mul_f32");
  add_vector<[](float a, float b) { return max_of(a, b); }, F32, F32, F32>(t, "v_max_f32");
  add_vector<[](float a, float b) { return min_of(a, b); }, F32, F32, F32>(t, "v_min_f32");
  add_vector<[](float a, float b, float c) { return std::fma(a, b, c); }, F32, F32, F32, F32>(t, "v_fma_f32");
  add_vector<[](float a, float b, float c) { return std::fma(a, b, c); }, F32, F32, F32, F32>(t, "v_fmaak_f32");
  add_vector<[](float a, float k, float c) { return std::fma(a, k, c); }, F32, F32, F32, F32>(t, "v_fmamk_f32");
  add_accumulate<[](float a, float b, float c) { return std::fma(a, b, c); }>(t, "v_fmac_f32");
  add_vector<[](float a, float b, float c) { return max_of(max_of(a, b), c); }, F32, F32, F32, F32>(t, "v_max3_f32");
  add_vector<[](float a, float b, float c) { return min_of(min_of(a, b), c); }, F32, F32, F32, F32>(t, "v_min3_f32");
  add_vector<[](float a, float b, float c) { return med3(a, b, c); }, F32, F32, F32, F32>(t, "v_med3_f32");
  add_vector<[](float a, float b, float c) { return max_of(min_of(a, b), c); }, F32, F32, F32, F32>(t, "v_minmax_f32");
  add_vector<[](float a, float b, float c) { return min_of(max_of(a, b), c); }, F32, F32, F32, F32>(t, "v_maxmin_f32");
  add_vector<[](float a, i b) { return std::ldexp(a, b); }, F32, F32, I32>(t, "v_ldexp_f32");
  add_vector<[](float a) { return std::rint(a); }, F32, F32>(t, "v_rndne_f32");
  add_vector<[](float a) { return std::trunc(a); }, F32, F32>(t, "v_trunc_f32");
  add_vector<[](float a) { return std::floor(a); }, F32, F32>(t, "v_floor_f32");
  add_vector<[](float a) { return std::ceil(a); }, F32, F32>(t, "v_ceil_f32");
  add_vector<[](float a) { return min_of(a - std::floor(a), 0x1.fffffep-1f); }, F32, F32>(t, "v_fract_f32");
  add_vector<[](float a) { return std::isfinite(a) && a != 0 ? std::ilogb(a) + 1 : 0; }, I32, F32>(
      t, "v_frexp_exp_i32_f32");
  add_vector<[](float a) {
    int e;
    return std::isfinite(a) ? std::frexp(a, &e) : a;
  },
             F32, F32>(t, "v_frexp_mant_f32");
  add_vector<[](float a) { return flush(1.0f / flush(a)); }, F32, F32>(t, "v_rcp_f32", special);
  add_vector<[](float a) { return flush(1.0f / flush(a)); }, F32, F32>(t, "v_rcp_iflag_f32", special);
  add_vector<[](float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(flush(a)))); }, F32, F32>(
      t, "v_rsq_f32", special);
  add_vector<[](float a) { return std::sqrt(flush(a)); }, F32, F32>(t, "v_sqrt_f32", special);
  add_vector<[](float a) { return flush(static_cast<float>(std::exp2(static_cast<double>(flush(a))))); }, F32, F32>(
      t, "v_exp_f32", special);
  add_vector<[](float a) { return static_cast<float>(std::log2(static_cast<double>(flush(a)))); }, F32, F32>(
      t, "v_log_f32", special);
}

void add_conversions(Operations& t) {
  add_vector<[](i a) { return static_cast<float>(a); }, F32, I32>(t, "v_cvt_f32_i32");
  add_vector<[](u a) { return static_cast<float>(a); }, F32, U32>(t, "v_cvt_f32_u32");
  add_vector<[](float a) { return to_int<i>(a); }, I32, F32>(t, "v_cvt_i32_f32");
  add_vector<[](float a) { return to_int<u>(a); }, U32, F32>(t, "v_cvt_u32_f32");
  add_vector<[](float a) { return to_int<i>(std::floor(a)); }, I32, F32>(t, "v_cvt_floor_i32_f32");
  add_vector<[](float a) { return to_int<i>(std::floor(a + 0.5f)); }, I32, F32>(t, "v_cvt_nearest_i32_f32");
  add_vector<[](float a) { return a; }, F16, F32>(t, "v_cvt_f16_f32");
  add_vector<[](float a) { return a; }, F32, F16>(t, "v_cvt_f32_f16");
  add_vector<[](u a) { return static_cast<float>(a & 0xff); }, F32, U32>(t, "v_cvt_f32_ubyte0");
  add_vector<[](u a) { return (static_cast<float>(a >> 8 & 0xff)); }, F32, U32>(t, "v_cvt_f32_ubyte1");
  add_vector<[](u a) { return (static_cast<float>(a >> 16 & 0xff)); }, F32, U32>(t, "v_cvt_f32_ubyte2");
  add_vector<[](u a) { return (static_cast<float>(a >> 24)); }, F32, U32>(t, "v_cvt_f32_ubyte3");
  add_vector<[](float a) { return static_cast<double>(a); }, F64, F32>(t, "v_cvt_f64_f32", Class::kDouble);
  add_vector<[](double a) { return static_cast<float>(a); }, F32, F64>(t, "v_cvt_f32_f64", Class::kDouble);
  add_vector<[](u a) { return static_cast<double>(a); }, F64, U32>(t, "v_cvt_f64_u32", Class::kDouble);
  add_vector<[](i a) { return static_cast<double>(a); }, F64, I32>(t, "v_cvt_f64_i32", Class::kDouble);
  add_vector<[](double a) { return to_int<i>(a); }, I32, F64>(t, "v_cvt_i32_f64", Class::kDouble);
  add_vector<[](double a) { return to_int<u>(a); }, U32, F64>(t, "v_cvt_u32_f64", Class::kDouble);
  add_vector<[](float a, float b) { return round_to_zero_half(a) | round_to_zero_half(b) << 16; }, U32, F32, F32>(
      t, "v_cvt_pk_rtz_f16_f32");
  add_vector<[](i a) { return static_cast<float>(a); }, F16, I16>(t, "v_cvt_f16_i16");
  add_vector<[](u a) { return static_cast<float>(a); }, F16, U16>(t, "v_cvt_f16_u16");
}

void add_double(Operations& t) {
  constexpr Class c = Class::kDouble;
  add_vector<[](double a, double b) { return a + b; }, F64, F64, F64>(t, "v_add_f64", c);
  add_vector<[](double a, double b) { return a * b; }, F64, F64, F64>(t, "v_mul_f64", c);
  add_vector<[](double a, double b) { return max_of(a, b); }, F64, F64, F64>(t, "v_max_f64", c);
  add_vector<[](double a, double b) { return min_of(a, b); }, F64, F64, F64>(t, "v_min_f64", c);
  add_vector<[](double a, double b, double d) { return std::fma(a, b, d); }, F64, F64, F64, F64>(t, "v_fma_f64", c);
  add_vector<[](double a, i b) { return std::ldexp(a, b); }, F64, F64, I32>(t, "v_ldexp_f64", c);
  add_vector<[](double a) { return std::rint(a); }, F64, F64>(t, "v_rndne_f64", c);
  add_vector<[](double a) { return std::trunc(a); }, F64, F64>(t, "v_trunc_f64", c);
  add_vector<[](double a) { return std::floor(a); }, F64, F64>(t, "v_floor_f64", c);
  add_vector<[](double a) { return std::ceil(a); }, F64, F64>(t, "v_ceil_f64", c);
  add_vector<[](double a) { return 1.0 / a; }, F64, F64>(t, "v_rcp_f64", c);
  add_vector<[](double a) { return 1.0 / std::sqrt(a); }, F64, F64>(t, "v_rsq_f64", c);
  add_vector<[](double a) { return std::sqrt(a); }, F64, F64>(t, "v_sqrt_f64", c);
  add_vector<[](double a) { return std::isfinite(a) && a != 0 ? std::ilogb(a) + 1 : 0; }, I32, F64>(
      t, "v_frexp_exp_i32_f64", c);
  add_vector<[](double a) {
    int e;
    return std::isfinite(a) ? std::frexp(a, &e) : a;
  },
             F64, F64>(t, "v_frexp_mant_f64", c);
}

void add_half(Operations& t) {
  add_vector<[](float a, float b) { return a + b; }, F16, F16, F16>(t, "v_add_f16");
  add_vector<[](float a, float b) { return a - b; }, F16, F16, F16>(t, "v_sub_f16");
  add_vector<[](float a, float b) { return a * b; }, F16, F16, F16>(t, "v_mul_f16");
  add_vector<[](float a, float b) { return max_of(a, b); }, F16, F16, F16>(t, "v_max_f16");
  add_vector<[](float a, float b) { return min_of(a, b); }, F16, F16, F16>(t, "v_min_f16");
  add_packed<[](float a, float b, float) { return a + b; }, 2>(t, "v_pk_add_f16");
  add_packed<[](float a, float b, float) { return a * b; }, 2>(t, "v_pk_mul_f16");
  add_packed<[](float a, float b, float) { return max_of(a, b); }, 2>(t, "v_pk_max_f16");
  add_packed<[](float a, float b, float) { return min_of(a, b); }, 2>(t, "v_pk_min_f16");
  add_packed<[](double a, double b, double c) { return std::fma(a, b, c); }, 3>(t, "v_pk_fma_f16");
  t.add("v_pack_b32_f16", {pack_half, Class::kPacked, 1, {Type::kF16, Type::kF16}});
  const std::vector<Type> mixed = {Type::kF32, Type::kF32, Type::kF32};
  t.add("v_fma_mix_f32", {fma_mix<0>, Class::kValu, 1, mixed, false, 0, 0, true});
  t.add("v_fma_mixlo_f16", {fma_mix<1>, Class::kValu, 1, mixed, false, 0, 0, true});
  t.add("v_fma_mixhi_f16", {fma_mix<2>, Class::kValu, 1, mixed, false, 0, 0, true});
}

}  // namespace

void add_float(Operations& t) {
  add_single(t);
  add_conversions(t);
  add_double(t);
  add_half(t);
  add_division<F32>(t, "f32", Class::kValu);
  add_division<F64>(t, "f64", Class::kDouble);
}

}  // namespace rdna
