// Instructions that move values between lanes, or between lanes and scalars, and DPP.

#include <bit>

#include "operands.h"

namespace rdna {
namespace {

uint32_t lane_of(const Wave& w, const Operand& o, uint32_t lane) {
  return o.kind == Operand::kVector ? w.v[o.reg][lane] : scalar32(w, o);
}

void read_first_lane(Wave& w, const Instruction& in) {
  const uint32_t lane = w.exec() != 0 ? static_cast<uint32_t>(std::countr_zero(w.exec())) : 0;
  set_scalar32(w, in.dst, lane_of(w, in.src[0], lane));
}

void read_lane(Wave& w, const Instruction& in) {
  set_scalar32(w, in.dst, lane_of(w, in.src[0], scalar32(w, in.src[1]) & 31));
}

void write_lane(Wave& w, const Instruction& in) {  // whatever EXEC says
  w.v[in.dst.reg][scalar32(w, in.src[1]) & 31] = scalar32(w, in.src[0]);
}

// How many of the mask's bits lie below each lane, and a sum.
void mbcnt_lo(Wave& w, const Instruction& in) {
  uint32_t a[kLanes], b[kLanes], r[kLanes];
  const uint32_t* mask = fetch<U32>(w, in, 0, a);
  const uint32_t* sum = fetch<U32>(w, in, 1, b);
  for (int l = 0; l < kLanes; l++) r[l] = sum[l] + static_cast<uint32_t>(std::popcount(mask[l] & ((1u << l) - 1)));
  store<U32>(w, in, in.dst, r);
}

void mbcnt_hi(Wave& w, const Instruction& in) {  // lanes 32.. of which a wave32 has none
  uint32_t b[kLanes], r[kLanes];
  std::memcpy(r, fetch<U32>(w, in, 1, b), sizeof r);
  store<U32>(w, in, in.dst, r);
}

// Within rows of 16 lanes, or across the two: 16 selectors of 4 bits in two scalars. op_sel: fetch inactive lanes, and
// 0 instead of the old value where a lane reads nothing.
template <bool kAcross>
void permlane16(Wave& w, const Instruction& in) {
  const uint64_t select = scalar32(w, in.src[1]) | uint64_t{scalar32(w, in.src[2])} << 32;
  uint32_t source[kLanes], r[kLanes];
  std::memcpy(source, w.v[in.src[0].reg], sizeof source);
  for (uint32_t l = 0; l < kLanes; l++) {
    const uint32_t row = kAcross ? (l & 16) ^ 16 : l & 16;
    const uint32_t from = row + (select >> (4 * (l & 15)) & 15);
    const bool readable = (w.exec() >> from & 1) || (in.op_sel & 1);
    r[l] = readable ? source[from] : in.op_sel & 2 ? 0 : w.v[in.dst.reg][l];
  }
  store<U32>(w, in, in.dst, r);
}

void permlane64(Wave&, const Instruction&) {}  // nothing in a wave32

void ds_bpermute(Wave& w, const Instruction& in) {
  uint32_t r[kLanes];
  for (int l = 0; l < kLanes; l++) {
    const uint32_t from = (w.v[in.src[0].reg][l] + static_cast<uint32_t>(in.offset)) / 4 % kLanes;
    r[l] = w.exec() >> from & 1 ? w.v[in.src[1].reg][from] : 0;  // EXEC counts for the source too
  }
  store32(w, in.dst.reg, r, w.exec());
}

void ds_permute(Wave& w, const Instruction& in) {
  uint32_t r[kLanes] = {};
  for (int l = 0; l < kLanes; l++) {
    if (w.exec() >> l & 1) {
      r[(w.v[in.src[0].reg][l] + static_cast<uint32_t>(in.offset)) / 4 % kLanes] = w.v[in.src[1].reg][l];
    }
  }
  store32(w, in.dst.reg, r, w.exec());
}

void ds_swizzle(Wave& w, const Instruction& in) {
  const uint32_t code = static_cast<uint32_t>(in.offset);
  uint32_t r[kLanes];
  for (uint32_t l = 0; l < kLanes; l++) {
    uint32_t from;
    if (code >= 0xc000) fault("ds_swizzle of this mode is not modelled");
    if (code & 0x8000) {
      from = (l & ~3u) + (code >> (2 * (l & 3)) & 3);
    } else {
      from = ((l & (code & 31)) | (code >> 5 & 31)) ^ (code >> 10 & 31);
    }
    r[l] = w.exec() >> from & 1 ? w.v[in.src[0].reg][from] : 0;
  }
  store32(w, in.dst.reg, r, w.exec());
}

void add_ds(Operations& t, const char* name, Run run) {
  Operation op;
  op.run = run;
  op.klass = Class::kLane;
  op.types = {Type::kU32, Type::kU32};
  t.add(name, op);
}

}  // namespace

// Permutes src0 into a register of its own and runs the instruction on that. A lane whose source lies outside its row
// or is inactive keeps its result, or reads 0 under bound_ctrl.
void run_dpp(Wave& w, const Instruction& in) {
  uint32_t readable = 0;
  const uint32_t active = in.fetch_inactive ? kAll : w.exec();
  const uint32_t* from = w.v[in.src[0].reg];
  uint32_t* to = w.v[256];
  for (int l = 0; l < kLanes; l++) {
    const int s = in.lane_source[static_cast<size_t>(l)];
    const bool there = s >= 0 && (active >> s & 1);
    to[l] = there ? from[s] : 0;
    readable |= (there ? 1u : 0u) << l;
  }
  const uint32_t exec = w.exec();
  Instruction plain = in;
  plain.src[0].reg = 256;
  w.s[kExec] &= in.write_lanes & (in.bound_ctrl ? kAll : readable);
  in.inner(w, plain);
  w.s[kExec] = exec;
}

void add_lane(Operations& t) {
  constexpr Type u = Type::kU32;
  t.add("v_readfirstlane_b32", {read_first_lane, Class::kLane, 1, {u}});
  t.add("v_readlane_b32", {read_lane, Class::kLane, 1, {u, u}});
  t.add("v_writelane_b32", {write_lane, Class::kLane, 1, {u, u}});
  t.add("v_mbcnt_lo_u32_b32", {mbcnt_lo, Class::kValu, 1, {u, u}});
  t.add("v_mbcnt_hi_u32_b32", {mbcnt_hi, Class::kValu, 1, {u, u}});
  t.add("v_permlane16_b32", {permlane16<false>, Class::kLane, 1, {u, u, u}});
  t.add("v_permlanex16_b32", {permlane16<true>, Class::kLane, 1, {u, u, u}});
  t.add("v_permlane64_b32", {permlane64, Class::kLane, 1, {u}});
  add_ds(t, "ds_bpermute_b32", ds_bpermute);
  add_ds(t, "ds_permute_b32", ds_permute);
  t.add("ds_swizzle_b32", {ds_swizzle, Class::kLane, 1, {u}});
}

}  // namespace rdna
