// Vector instructions of integers: VOP1, VOP2, VOP3, and the packed ones of 16 bits.

#include <bit>

#include "operands.h"

namespace rdna {
namespace {

// The carry-in and carry-out forms: two results.
template <auto Fn>  // (a, b, carry) -> 64 bits: the result, bit 32 the carry
void with_carry(Wave& w, const Instruction& in) {
  alignas(64) uint32_t a[kLanes], b[kLanes], c[kLanes] = {}, r[kLanes], carry[kLanes];
  const uint32_t* pa = fetch<U32>(w, in, 0, a);
  const uint32_t* pb = fetch<U32>(w, in, 1, b);
  const uint32_t* pc = in.src[2].kind != Operand::kNone ? fetch<Mask>(w, in, 2, c) : c;
  for (int l = 0; l < kLanes; l++) {
    const uint64_t t = Fn(uint64_t{pa[l]}, uint64_t{pb[l]}, uint64_t{pc[l]});
    r[l] = static_cast<uint32_t>(t);
    carry[l] = t >> 32 & 1;
  }
  store<U32>(w, in, in.dst, r);
  store<Mask>(w, in, in.dst2, carry);
}

template <auto Fn>
void add_carry(Operations& t, const char* name, bool carry_in) {
  Operation op;
  op.run = with_carry<Fn>;
  op.klass = Class::kValu;
  op.results = 2;
  op.types = {Type::kU32, Type::kU32};
  if (carry_in) op.types.push_back(Type::kMask);
  t.add(name, op);
}

template <typename A, typename B>  // B: 64 bits
void mad_64(Wave& w, const Instruction& in) {
  alignas(64) typename A::C a[kLanes], b[kLanes];
  alignas(64) typename B::C c[kLanes], r[kLanes];
  uint32_t carry[kLanes];
  const auto* pa = fetch<A>(w, in, 0, a);
  const auto* pb = fetch<A>(w, in, 1, b);
  const auto* pc = fetch<B>(w, in, 2, c);
  for (int l = 0; l < kLanes; l++) {
    const __int128 wide = static_cast<__int128>(pa[l]) * pb[l] + pc[l];
    r[l] = static_cast<typename B::C>(wide);
    carry[l] = static_cast<uint32_t>(wide >> 64) & 1;
  }
  store<B>(w, in, in.dst, r);
  store<Mask>(w, in, in.dst2, carry);
}

// Packed pairs of 16 bits: op_sel picks the half that makes the low result, op_sel_hi that of the high one.
template <auto Fn, int kSources>
void packed(Wave& w, const Instruction& in) {
  uint32_t room[3][kLanes];
  const uint32_t* s[3] = {};
  for (int k = 0; k < kSources; k++) s[k] = fetch<U32>(w, in, k, room[k]);
  uint32_t r[kLanes];
  for (int l = 0; l < kLanes; l++) {
    uint32_t low[3] = {}, high[3] = {};
    for (int k = 0; k < kSources; k++) {
      low[k] = s[k][l] >> (in.op_sel >> k & 1 ? 16 : 0) & 0xffff;
      high[k] = s[k][l] >> (in.op_sel_hi >> k & 1 ? 16 : 0) & 0xffff;
    }
    r[l] = (Fn(low[0], low[1], low[2]) & 0xffff) | Fn(high[0], high[1], high[2]) << 16;
  }
  store<U32>(w, in, in.dst, r);
}

template <auto Fn, int kSources>
void add_packed(Operations& t, const char* name) {
  Operation op;
  op.run = packed<Fn, kSources>;
  op.klass = Class::kPacked;
  op.types.assign(kSources, Type::kU32);
  t.add(name, op);
}

constexpr int32_t signed_field(uint32_t v, uint32_t at, uint32_t bits) {
  if (bits == 0) return 0;
  const uint32_t field = static_cast<uint32_t>(static_cast<int32_t>(v) >> at);
  return static_cast<int32_t>(field << (32 - bits)) >> (32 - bits);
}

uint32_t permute_byte(uint64_t data, uint32_t sel) {
  if (sel >= 13) return 0xff;
  if (sel == 12) return 0;
  if (sel >= 8) return data >> (16 * (sel - 8) + 15) & 1 ? 0xff : 0;
  return data >> (8 * sel) & 0xff;
}

// 4 products of bytes and a sum; neg_lo says which operand is signed.
void dot4_i32_iu8(Wave& w, const Instruction& in) {
  uint32_t room[3][kLanes], r[kLanes];
  const uint32_t* a = fetch<U32>(w, in, 0, room[0]);
  const uint32_t* b = fetch<U32>(w, in, 1, room[1]);
  const uint32_t* c = fetch<U32>(w, in, 2, room[2]);
  const uint32_t flip_a = in.neg_lo & 1 ? 0x80 : 0, flip_b = in.neg_lo & 2 ? 0x80 : 0;
  for (int l = 0; l < kLanes; l++) {
    uint32_t sum = c[l];
    for (int i = 0; i < 4; i++) {  // (x ^ 0x80) - 0x80 extends a sign
      const int32_t x = static_cast<int32_t>((a[l] >> (8 * i) & 0xff) ^ flip_a) - static_cast<int32_t>(flip_a);
      const int32_t y = static_cast<int32_t>((b[l] >> (8 * i) & 0xff) ^ flip_b) - static_cast<int32_t>(flip_b);
      sum += static_cast<uint32_t>(x * y);
    }
    r[l] = sum;
  }
  if (in.clamp) fault("v_dot4 with clamp is not modelled");
  store<U32>(w, in, in.dst, r);
}

using u = uint32_t;
using i = int32_t;
using ul = uint64_t;
using il = int64_t;

void add_simple(Operations& t) {
  add_vector<[](u a) { return a; }, U32, U32>(t, "v_mov_b32");
  add_vector<[](u a) { return ~a; }, U32, U32>(t, "v_not_b32");
  add_vector<[](u a) {
    u r = 0;
    for (int b = 0; b < 32; b++) r |= (a >> b & 1) << (31 - b);
    return r;
  },
             U32, U32>(t, "v_bfrev_b32");
  add_vector<[](u a) { return a != 0 ? static_cast<u>(std::countl_zero(a)) : kAll; }, U32, U32>(t, "v_clz_i32_u32");
  add_vector<[](u a) { return a != 0 ? static_cast<u>(std::countr_zero(a)) : kAll; }, U32, U32>(t, "v_ctz_i32_b32");
  add_vector<[](u a) {
    const u same = static_cast<u>(static_cast<i>(a) < 0 ? std::countl_one(a) : std::countl_zero(a));
    return same == 32 ? kAll : same;
  },
             U32, U32>(t, "v_cls_i32");
  add_vector<[](u a, u b) { return a + b; }, U32, U32, U32>(t, "v_add_nc_u32");
  add_vector<[](u a, u b) { return a - b; }, U32, U32, U32>(t, "v_sub_nc_u32");
  add_vector<[](u a, u b) { return b - a; }, U32, U32, U32>(t, "v_subrev_nc_u32");
  add_vector<[](u a, u b) { return a + b; }, U32, U32, U32>(t, "v_add_nc_i32");
  add_vector<[](u a, u b) { return a - b; }, U32, U32, U32>(t, "v_sub_nc_i32");
  add_vector<[](u a, u b) { return a & b; }, U32, U32, U32>(t, "v_and_b32");
  add_vector<[](u a, u b) { return a | b; }, U32, U32, U32>(t, "v_or_b32");
  add_vector<[](u a, u b) { return a ^ b; }, U32, U32, U32>(t, "v_xor_b32");
  add_vector<[](u a, u b) { return ~(a ^ b); }, U32, U32, U32>(t, "v_xnor_b32");
  add_vector<[](i a, i b) { return a < b ? a : b; }, I32, I32, I32>(t, "v_min_i32");
  add_vector<[](i a, i b) { return (a > b ? a : b); }, I32, I32, I32>(t, "v_max_i32");
  add_vector<[](u a, u b) { return a < b ? a : b; }, U32, U32, U32>(t, "v_min_u32");
  add_vector<[](u a, u b) { return (a > b ? a : b); }, U32, U32, U32>(t, "v_max_u32");
  add_vector<[](u a, u b) { return b << (a & 31); }, U32, U32, U32>(t, "v_lshlrev_b32");
  add_vector<[](u a, u b) { return (b >> (a & 31)); }, U32, U32, U32>(t, "v_lshrrev_b32");
  add_vector<[](u a, i b) { return (b >> (a & 31)); }, I32, U32, I32>(t, "v_ashrrev_i32");
  add_vector<[](u a, ul b) { return b << (a & 63); }, U64, U32, U64>(t, "v_lshlrev_b64");
  add_vector<[](u a, ul b) { return (b >> (a & 63)); }, U64, U32, U64>(t, "v_lshrrev_b64");
  add_vector<[](u a, il b) { return (b >> (a & 63)); }, I64, U32, I64>(t, "v_ashrrev_i64");
  Operation select;  // of floats, as operands may be negated; a half of a dual instruction leaves VCC unsaid
  select.run = by_lane<[](float a, float b, u c) { return c ? b : a; }, F32, F32, F32, Mask>;
  select.klass = Class::kValu;
  select.types = {Type::kF32, Type::kF32, Type::kMask};
  select.reads = kVcc;
  t.add("v_cndmask_b32", select);
  add_vector<[](u a, u b) { return (a & 0xffffff) * (b & 0xffffff); }, U32, U32, U32>(t, "v_mul_u32_u24");
  add_vector<[](u a, u b) { return static_cast<u>(signed_field(a, 0, 24)) * static_cast<u>(signed_field(b, 0, 24)); },
             U32, U32, U32>(t, "v_mul_i32_i24");
  add_vector<[](u a, u b) { return (static_cast<u>((ul{a & 0xffffff} * (b & 0xffffff)) >> 32)); }, U32, U32, U32>(
      t, "v_mul_hi_u32_u24");
  add_vector<[](u a, u b) { return a * b; }, U32, U32, U32>(t, "v_mul_lo_u32");
  add_vector<[](u a, u b) { return (static_cast<u>(ul{a} * b >> 32)); }, U32, U32, U32>(t, "v_mul_hi_u32");
  add_vector<[](i a, i b) { return (static_cast<i>(il{a} * b >> 32)); }, I32, I32, I32>(t, "v_mul_hi_i32");
  add_vector<[](u a, u b) { return b + static_cast<u>(std::popcount(a)); }, U32, U32, U32>(t, "v_bcnt_u32_b32");
}

void add_three(Operations& t) {
  add_vector<[](u a, u b, u c) { return a + b + c; }, U32, U32, U32, U32>(t, "v_add3_u32");
  add_vector<[](u a, u b, u c) { return (a + b) << (c & 31); }, U32, U32, U32, U32>(t, "v_add_lshl_u32");
  add_vector<[](u a, u b, u c) { return (a << (b & 31)) + c; }, U32, U32, U32, U32>(t, "v_lshl_add_u32");
  add_vector<[](u a, u b, u c) { return (a << (b & 31)) | c; }, U32, U32, U32, U32>(t, "v_lshl_or_b32");
  add_vector<[](u a, u b, u c) { return (a & b) | c; }, U32, U32, U32, U32>(t, "v_and_or_b32");
  add_vector<[](u a, u b, u c) { return a | b | c; }, U32, U32, U32, U32>(t, "v_or3_b32");
  add_vector<[](u a, u b, u c) { return a ^ b ^ c; }, U32, U32, U32, U32>(t, "v_xor3_b32");
  add_vector<[](u a, u b, u c) { return (a ^ b) + c; }, U32, U32, U32, U32>(t, "v_xad_u32");
  add_vector<[](u a, u b, u c) { return (a & b) | (~a & c); }, U32, U32, U32, U32>(t, "v_bfi_b32");
  add_vector<[](u a, u b, u c) { return (static_cast<u>((ul{a} << 32 | b) >> (c & 31))); }, U32, U32, U32, U32>(
      t, "v_alignbit_b32");
  add_vector<[](u a, u b, u c) { return (static_cast<u>((ul{a} << 32 | b) >> (8 * (c & 3)))); }, U32, U32, U32, U32>(
      t, "v_alignbyte_b32");
  add_vector<[](u a, u b, u c) { return ((a >> (b & 31)) & ((1u << (c & 31)) - 1)); }, U32, U32, U32, U32>(t,
                                                                                                           "v_bfe_u32");
  add_vector<[](u a, u b, u c) { return signed_field(a, b & 31, c & 31); }, I32, U32, U32, U32>(t, "v_bfe_i32");
  add_vector<[](u a, u b, u c) { return (a & 0xffffff) * (b & 0xffffff) + c; }, U32, U32, U32, U32>(t, "v_mad_u32_u24");
  add_vector<[](u a, u b, u c) {
    return static_cast<u>(signed_field(a, 0, 24)) * static_cast<u>(signed_field(b, 0, 24)) + c;
  },
             U32, U32, U32, U32>(t, "v_mad_i32_i24");
  add_vector<[](u a, u b, u c) { return (a & 0xffff) * (b & 0xffff) + c; }, U32, U32, U32, U32>(t, "v_mad_u32_u16");
  add_vector<[](u a, u b, u c) {
    const ul data = ul{a} << 32 | b;
    u r = 0;
    for (int k = 0; k < 4; k++) r |= permute_byte(data, c >> (8 * k) & 0xff) << (8 * k);
    return r;
  },
             U32, U32, U32, U32>(t, "v_perm_b32");
  add_vector<[](i a, i b, i c) { return std::min(std::min(a, b), c); }, I32, I32, I32, I32>(t, "v_min3_i32");
  add_vector<[](i a, i b, i c) { return std::max(std::max(a, b), c); }, I32, I32, I32, I32>(t, "v_max3_i32");
  add_vector<[](u a, u b, u c) { return std::min(std::min(a, b), c); }, U32, U32, U32, U32>(t, "v_min3_u32");
  add_vector<[](u a, u b, u c) { return std::max(std::max(a, b), c); }, U32, U32, U32, U32>(t, "v_max3_u32");
  add_vector<[](i a, i b, i c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }, I32, I32, I32, I32>(
      t, "v_med3_i32");
  add_vector<[](u a, u b, u c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }, U32, U32, U32, U32>(
      t, "v_med3_u32");
  add_vector<[](i a, i b, i c) { return std::max(std::min(a, b), c); }, I32, I32, I32, I32>(t, "v_minmax_i32");
  add_vector<[](i a, i b, i c) { return std::min(std::max(a, b), c); }, I32, I32, I32, I32>(t, "v_maxmin_i32");
  add_vector<[](u a, u b, u c) { return std::max(std::min(a, b), c); }, U32, U32, U32, U32>(t, "v_minmax_u32");
  add_vector<[](u a, u b, u c) { return std::min(std::max(a, b), c); }, U32, U32, U32, U32>(t, "v_maxmin_u32");
  add_vector<[](u a, u b, u c) {
    for (int k = 0; k < 32; k += 8) {
      const i d = static_cast<i>(a >> k & 0xff) - static_cast<i>(b >> k & 0xff);
      c += static_cast<u>(d < 0 ? -d : d);
    }
    return c;
  },
             U32, U32, U32, U32>(t, "v_sad_u8");
}

void add_sixteen(Operations& t) {
  add_vector<[](u a, u b) { return a + b; }, U16, U16, U16>(t, "v_add_nc_u16");
  add_vector<[](u a, u b) { return a - b; }, U16, U16, U16>(t, "v_sub_nc_u16");
  add_vector<[](u a, u b) { return a * b; }, U16, U16, U16>(t, "v_mul_lo_u16");
  add_vector<[](u a, u b) { return b << (a & 15); }, U16, U16, U16>(t, "v_lshlrev_b16");
  add_vector<[](u a, u b) { return (b >> (a & 15)); }, U16, U16, U16>(t, "v_lshrrev_b16");
  add_vector<[](u a, i b) { return (b >> (a & 15)); }, I16, U16, I16>(t, "v_ashrrev_i16");
  add_vector<[](u a, u b) { return a & b; }, U16, U16, U16>(t, "v_and_b16");
  add_vector<[](u a, u b) { return a | b; }, U16, U16, U16>(t, "v_or_b16");
  add_vector<[](u a, u b) { return a ^ b; }, U16, U16, U16>(t, "v_xor_b16");
  add_vector<[](u a, u b) { return std::min(a, b); }, U16, U16, U16>(t, "v_min_u16");
  add_vector<[](u a, u b) { return std::max(a, b); }, U16, U16, U16>(t, "v_max_u16");
  add_vector<[](i a, i b) { return std::min(a, b); }, I16, I16, I16>(t, "v_min_i16");
  add_vector<[](i a, i b) { return std::max(a, b); }, I16, I16, I16>(t, "v_max_i16");
  add_vector<[](u a) { return a; }, U16, U16>(t, "v_mov_b16");
  add_packed<[](u a, u b, u) { return a + b; }, 2>(t, "v_pk_add_u16");
  add_packed<[](u a, u b, u) { return a + b; }, 2>(t, "v_pk_add_i16");
  add_packed<[](u a, u b, u) { return a - b; }, 2>(t, "v_pk_sub_u16");
  add_packed<[](u a, u b, u) { return a - b; }, 2>(t, "v_pk_sub_i16");
  add_packed<[](u a, u b, u) { return a * b; }, 2>(t, "v_pk_mul_lo_u16");
  add_packed<[](u a, u b, u c) { return a * b + c; }, 3>(t, "v_pk_mad_u16");
  add_packed<[](u a, u b, u c) { return a * b + c; }, 3>(t, "v_pk_mad_i16");
  add_packed<[](u a, u b, u) { return b << (a & 15); }, 2>(t, "v_pk_lshlrev_b16");
  add_packed<[](u a, u b, u) { return (b >> (a & 15)); }, 2>(t, "v_pk_lshrrev_b16");
  add_packed<[](u a, u b, u) { return (static_cast<u>(static_cast<int16_t>(b) >> (a & 15))); }, 2>(t,
                                                                                                   "v_pk_ashrrev_i16");
}

}  // namespace

void add_integer(Operations& t) {
  add_simple(t);
  add_three(t);
  add_sixteen(t);
  add_carry<[](ul a, ul b, ul) { return a + b; }>(t, "v_add_co_u32", false);
  add_carry<[](ul a, ul b, ul) { return a - b; }>(t, "v_sub_co_u32", false);  // a borrow sets bit 32
  add_carry<[](ul a, ul b, ul) { return b - a; }>(t, "v_subrev_co_u32", false);
  add_carry<[](ul a, ul b, ul c) { return a + b + c; }>(t, "v_add_co_ci_u32", true);
  add_carry<[](ul a, ul b, ul c) { return a - b - c; }>(t, "v_sub_co_ci_u32", true);
  add_carry<[](ul a, ul b, ul c) { return b - a - c; }>(t, "v_subrev_co_ci_u32", true);
  t.add("v_mad_u64_u32", {mad_64<U32, U64>, Class::kValu, 2, {Type::kU32, Type::kU32, Type::kU64}});
  t.add("v_mad_i64_i32", {mad_64<I32, I64>, Class::kValu, 2, {Type::kI32, Type::kI32, Type::kI64}});
  t.add("v_dot4_i32_iu8", {dot4_i32_iu8, Class::kDot, 1, {Type::kU32, Type::kU32, Type::kU32}});
}

}  // namespace rdna
