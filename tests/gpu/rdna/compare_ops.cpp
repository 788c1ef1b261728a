// Comparisons: v_cmp writes a lane mask in which inactive lanes are 0, v_cmpx writes EXEC.

#include <bit>

#include "operands.h"

namespace rdna {
namespace {

template <auto Fn, typename A, typename B, bool kExecute>
void compare(Wave& w, const Instruction& in) {
  alignas(64) typename A::C a[kLanes];
  alignas(64) typename B::C b[kLanes];
  const auto* pa = fetch<A>(w, in, 0, a);
  const auto* pb = fetch<B>(w, in, 1, b);
  uint32_t r[kLanes], mask = 0;
  for (int l = 0; l < kLanes; l++) r[l] = Fn(pa[l], pb[l]) ? 1u : 0u;
  for (int l = 0; l < kLanes; l++) mask |= r[l] << l;
  mask &= w.exec();
  if constexpr (kExecute) {
    w.s[kExec] = mask;
  } else {
    set_scalar32(w, in.dst, mask);
  }
}

template <auto Fn, typename A, typename B>
void add_one(Operations& t, const std::string& name, Class klass) {
  t.add("v_cmp_" + name, {compare<Fn, A, B, false>, klass, 1, {A::kType, B::kType}});
  Operation x{compare<Fn, A, B, true>, klass, 0, {A::kType, B::kType}};
  x.writes = kExec;
  t.add("v_cmpx_" + name, x);
}

template <typename T>
void add_ordered(Operations& t, const std::string& type, Class klass = Class::kValu) {
  using C = typename T::C;
  add_one<[](C a, C b) { return a < b; }, T, T>(t, "lt_" + type, klass);
  add_one<[](C a, C b) { return a == b; }, T, T>(t, "eq_" + type, klass);
  add_one<[](C a, C b) { return a <= b; }, T, T>(t, "le_" + type, klass);
  add_one<[](C a, C b) { return (a > b); }, T, T>(t, "gt_" + type, klass);
  add_one<[](C a, C b) { return (a >= b); }, T, T>(t, "ge_" + type, klass);
  if constexpr (kReal<T>) {
    add_one<[](C a, C b) { return (a < b || a > b); }, T, T>(t, "lg_" + type, klass);
    add_one<[](C a, C b) { return a == a && b == b; }, T, T>(t, "o_" + type, klass);
    add_one<[](C a, C b) { return a != a || b != b; }, T, T>(t, "u_" + type, klass);
    add_one<[](C a, C b) { return (!(a >= b)); }, T, T>(t, "nge_" + type, klass);
    add_one<[](C a, C b) { return (!(a < b || a > b)); }, T, T>(t, "nlg_" + type, klass);
    add_one<[](C a, C b) { return (!(a > b)); }, T, T>(t, "ngt_" + type, klass);
    add_one<[](C a, C b) { return !(a <= b); }, T, T>(t, "nle_" + type, klass);
    add_one<[](C a, C b) { return !(a == b); }, T, T>(t, "neq_" + type, klass);
    add_one<[](C a, C b) { return !(a < b); }, T, T>(t, "nlt_" + type, klass);
  } else {
    add_one<[](C a, C b) { return a != b; }, T, T>(t, "ne_" + type, klass);
  }
}

// The bit of `classes` that the value's kind picks: signalling and quiet NaN, -inf, -normal, -denormal, -0, and the
// positive ones upwards.
template <typename F>
bool has_class(F v, uint32_t classes) {
  const bool negative = std::signbit(v);
  int bit;
  if (v != v) {
    using B = std::conditional_t<sizeof(F) == 8, uint64_t, uint32_t>;
    bit = std::bit_cast<B>(v) >> (std::numeric_limits<F>::digits - 2) & 1 ? 1 : 0;
  } else if (std::isinf(v)) {
    bit = negative ? 2 : 9;
  } else if (v == 0) {
    bit = negative ? 5 : 6;
  } else if (std::isnormal(v)) {
    bit = negative ? 3 : 8;
  } else {
    bit = negative ? 4 : 7;
  }
  return classes >> bit & 1;
}

}  // namespace

void add_compare(Operations& t) {
  add_ordered<F16>(t, "f16");
  add_ordered<F32>(t, "f32");
  add_ordered<F64>(t, "f64", Class::kDouble);
  add_ordered<I16>(t, "i16");
  add_ordered<U16>(t, "u16");
  add_ordered<I32>(t, "i32");
  add_ordered<U32>(t, "u32");
  add_ordered<I64>(t, "i64");
  add_ordered<U64>(t, "u64");
  add_one<[](float v, uint32_t c) { return has_class(v, c); }, F32, U32>(t, "class_f32", Class::kValu);
  add_one<[](double v, uint32_t c) { return has_class(v, c); }, F64, U32>(t, "class_f64", Class::kDouble);
}

}  // namespace rdna
