// Scalar instructions: SOP1, SOP2, SOPK, SOPC and SOPP.

#include <bit>
#include <cmath>

#include "operands.h"

namespace rdna {
namespace {

template <typename T>
typename T::C read(const Wave& w, const Operand& o) {
  return of_bits<T>(kWide<T> ? scalar64(w, o) : scalar32(w, o));
}
template <typename T>
void write(Wave& w, const Operand& o, typename T::C v) {
  if constexpr (kWide<T>) {
    set_scalar64(w, o, static_cast<uint64_t>(v));
  } else {
    set_scalar32(w, o, std::bit_cast<uint32_t>(v));
  }
}

enum class Scc { kKeep, kNonZero, kGiven };

// Fn(S::C..., bool& scc) -> D::C
template <auto Fn, Scc kScc_, typename D, typename... S>
void scalar(Wave& w, const Instruction& in) {
  bool scc = w.scc;
  const typename D::C r = [&]<size_t... k>(std::index_sequence<k...>) {
    return static_cast<typename D::C>(Fn(read<S>(w, in.src[k])..., scc));
  }(std::make_index_sequence<sizeof...(S)>());
  write<D>(w, in.dst, r);
  if (kScc_ == Scc::kNonZero) w.scc = r != 0;
  if (kScc_ == Scc::kGiven) w.scc = scc;
}

template <auto Fn, Scc kScc_, typename D, typename... S>
void add(Operations& t, const std::string& name) {
  t.add(name, {scalar<Fn, kScc_, D, S...>, Class::kSalu, 1, {S::kType...}});
}

// s_addk and the like: the result is a source too.
template <auto Fn, Scc kScc_, typename D, typename... S>
void add_k(Operations& t, const std::string& name) {
  Operation op{scalar<Fn, kScc_, D, S...>, Class::kSalu, 1, {S::kType...}};
  op.reads_result = true;
  t.add(name, op);
}

template <auto Fn, typename T>
void compare(Wave& w, const Instruction& in) {
  w.scc = Fn(read<T>(w, in.src[0]), read<T>(w, in.src[1]));
}

template <auto Fn, typename T>
void add_compare_one(Operations& t, const std::string& name) {
  t.add("s_cmp_" + name, {compare<Fn, T>, Class::kSalu, 0, {T::kType, T::kType}});
  t.add("s_cmpk_" + name, {compare<Fn, T>, Class::kSalu, 0, {T::kType, T::kType}});
}

template <typename T>
void add_compares(Operations& t, const std::string& type) {
  using C = typename T::C;
  add_compare_one<[](C a, C b) { return a == b; }, T>(t, "eq_" + type);
  add_compare_one<[](C a, C b) { return (kReal<T> ? a < b || a > b : a != b); }, T>(t, "lg_" + type);
  add_compare_one<[](C a, C b) { return a < b; }, T>(t, "lt_" + type);
  add_compare_one<[](C a, C b) { return a <= b; }, T>(t, "le_" + type);
  add_compare_one<[](C a, C b) { return (a > b); }, T>(t, "gt_" + type);
  add_compare_one<[](C a, C b) { return (a >= b); }, T>(t, "ge_" + type);
  if constexpr (kReal<T>) {
    add_compare_one<[](C a, C b) { return !(a == b); }, T>(t, "neq_" + type);
    add_compare_one<[](C a, C b) { return !(a < b); }, T>(t, "nlt_" + type);
    add_compare_one<[](C a, C b) { return !(a <= b); }, T>(t, "nle_" + type);
    add_compare_one<[](C a, C b) { return (!(a > b)); }, T>(t, "ngt_" + type);
    add_compare_one<[](C a, C b) { return (!(a >= b)); }, T>(t, "nge_" + type);
  }
}

// Saves EXEC and combines it with the source.
template <auto Fn>
void save_exec(Wave& w, const Instruction& in) {
  const uint32_t source = scalar32(w, in.src[0]), exec = w.exec();
  w.s[kExec] = Fn(source, exec);
  set_scalar32(w, in.dst, exec);
  w.scc = w.exec() != 0;
}

template <auto Fn>
void add_save_exec(Operations& t, const char* name) {
  Operation op{save_exec<Fn>, Class::kSalu, 1, {Type::kU32}};
  op.writes = kExec;
  t.add(name, op);
}

using u = uint32_t;
using i = int32_t;
using ul = uint64_t;
using il = int64_t;

template <typename T>
void add_bits(Operations& t, const std::string& type) {
  using C = typename T::C;
  using enum Scc;
  add<[](C a, bool&) { return a; }, kKeep, T, T>(t, "s_mov_" + type);
  add<[](C a, bool&) { return ~a; }, kNonZero, T, T>(t, "s_not_" + type);
  add<[](C a, C b, bool&) { return a & b; }, kNonZero, T, T, T>(t, "s_and_" + type);
  add<[](C a, C b, bool&) { return a | b; }, kNonZero, T, T, T>(t, "s_or_" + type);
  add<[](C a, C b, bool&) { return a ^ b; }, kNonZero, T, T, T>(t, "s_xor_" + type);
  add<[](C a, C b, bool&) { return a & ~b; }, kNonZero, T, T, T>(t, "s_and_not1_" + type);
  add<[](C a, C b, bool&) { return a | ~b; }, kNonZero, T, T, T>(t, "s_or_not1_" + type);
  add<[](C a, C b, bool&) { return ~(a & b); }, kNonZero, T, T, T>(t, "s_nand_" + type);
  add<[](C a, C b, bool&) { return ~(a | b); }, kNonZero, T, T, T>(t, "s_nor_" + type);
  add<[](C a, C b, bool&) { return ~(a ^ b); }, kNonZero, T, T, T>(t, "s_xnor_" + type);
  add<[](C a, u b, bool&) { return a << (b & (sizeof a * 8 - 1)); }, kNonZero, T, T, U32>(t, "s_lshl_" + type);
  add<[](C a, u b, bool&) { return (a >> (b & (sizeof a * 8 - 1))); }, kNonZero, T, T, U32>(t, "s_lshr_" + type);
  add<[](C a, C b, bool& scc) { return scc ? a : b; }, kKeep, T, T, T>(t, "s_cselect_" + type);
  add<[](C a, bool&) { return static_cast<u>(std::popcount(a)); }, kNonZero, U32, T>(t, "s_bcnt1_i32_" + type);
  add<[](C a, bool&) { return a != 0 ? static_cast<u>(std::countr_zero(a)) : kAll; }, kKeep, U32, T>(
      t, "s_ctz_i32_" + type);
  // only where SCC says so; the old value is the last source
  add_k<[](C a, C old, bool& scc) { return scc ? a : old; }, kKeep, T, T, T>(t, "s_cmov_" + type);
}

template <typename T>
bool overflows(T a, T b, T sum) {
  return ((a ^ sum) & (b ^ sum)) < 0;
}

void add_arithmetic(Operations& t) {
  using enum Scc;
  add<[](u a, u b, bool& c) {
    const ul s = ul{a} + b;
    c = (s >> 32);
    return static_cast<u>(s);
  },
      kGiven, U32, U32, U32>(t, "s_add_u32");
  add<[](u a, u b, bool& c) {
    c = (b > a);
    return a - b;
  },
      kGiven, U32, U32, U32>(t, "s_sub_u32");
  add<[](u a, u b, bool& c) {
    const ul s = ul{a} + b + c;
    c = (s >> 32);
    return static_cast<u>(s);
  },
      kGiven, U32, U32, U32>(t, "s_addc_u32");
  add<[](u a, u b, bool& c) {
    const ul take = ul{b} + c;
    c = (take > a);
    return static_cast<u>(a - take);
  },
      kGiven, U32, U32, U32>(t, "s_subb_u32");
  add<[](i a, i b, bool& c) {
    const i s = static_cast<i>(u(a) + u(b));
    c = overflows(a, b, s);
    return s;
  },
      kGiven, I32, I32, I32>(t, "s_add_i32");
  add<[](i a, i b, bool& c) {
    const i s = static_cast<i>(u(a) - u(b));
    c = overflows(a, ~b, s);
    return s;
  },
      kGiven, I32, I32, I32>(t, "s_sub_i32");
  add_k<[](i b, i a, bool& c) {
    const i s = static_cast<i>(u(a) + u(b));
    c = overflows(a, b, s);
    return s;
  },
        kGiven, I32, I32, I32>(t, "s_addk_i32");
  add_k<[](u b, u a, bool&) { return a * b; }, kKeep, U32, U32, U32>(t, "s_mulk_i32");
  add<[](i a, bool&) { return a; }, kKeep, I32, I32>(t, "s_movk_i32");
  add<[](u a, u b, bool&) { return a * b; }, kKeep, U32, U32, U32>(t, "s_mul_i32");
  add<[](u a, u b, bool&) { return (static_cast<u>(ul{a} * b >> 32)); }, kKeep, U32, U32, U32>(t, "s_mul_hi_u32");
  add<[](i a, i b, bool&) { return (static_cast<i>(il{a} * b >> 32)); }, kKeep, I32, I32, I32>(t, "s_mul_hi_i32");
  // SCC: whether the first one was taken
  add<[](i a, i b, bool& c) {
    c = a < b;
    return c ? a : b;
  },
      kGiven, I32, I32, I32>(t, "s_min_i32");
  add<[](u a, u b, bool& c) {
    c = a < b;
    return c ? a : b;
  },
      kGiven, U32, U32, U32>(t, "s_min_u32");
  add<[](i a, i b, bool& c) {
    c = (a >= b);
    return c ? a : b;
  },
      kGiven, I32, I32, I32>(t, "s_max_i32");
  add<[](u a, u b, bool& c) {
    c = (a >= b);
    return c ? a : b;
  },
      kGiven, U32, U32, U32>(t, "s_max_u32");
  add<[](i a, bool&) { return a < 0 ? static_cast<i>(0 - u(a)) : a; }, kNonZero, I32, I32>(t, "s_abs_i32");
  add<[](i a, i b, bool&) {
    const i d = static_cast<i>(u(a) - u(b));
    return d < 0 ? static_cast<i>(0 - u(d)) : d;
  },
      kNonZero, I32, I32, I32>(t, "s_absdiff_i32");
  add<[](i a, u b, bool&) { return (a >> (b & 31)); }, kNonZero, I32, I32, U32>(t, "s_ashr_i32");
  add<[](il a, u b, bool&) { return (a >> (b & 63)); }, kNonZero, I64, I64, U32>(t, "s_ashr_i64");
  add<[](u a, bool&) { return static_cast<i>(static_cast<int16_t>(a)); }, kKeep, I32, U32>(t, "s_sext_i32_i16");
  add<[](u a, bool&) { return static_cast<i>(static_cast<int8_t>(a)); }, kKeep, I32, U32>(t, "s_sext_i32_i8");
  for (int n = 1; n <= 4; n++) {  // s_lshl1_add_u32 .. s_lshl4_add_u32
    static constexpr auto shift_add = []<int kBits>(u a, u b, bool& c) {
      const ul s = (ul{a} << kBits) + b;
      c = s >> 32 != 0;
      return static_cast<u>(s);
    };
    const std::string name = "s_lshl" + std::to_string(n) + "_add_u32";
    if (n == 1)
      add<[](u a, u b, bool& c) { return (shift_add.operator()<1>(a, b, c)); }, kGiven, U32, U32, U32>(t, name);
    if (n == 2)
      add<[](u a, u b, bool& c) { return (shift_add.operator()<2>(a, b, c)); }, kGiven, U32, U32, U32>(t, name);
    if (n == 3)
      add<[](u a, u b, bool& c) { return (shift_add.operator()<3>(a, b, c)); }, kGiven, U32, U32, U32>(t, name);
    if (n == 4)
      add<[](u a, u b, bool& c) { return (shift_add.operator()<4>(a, b, c)); }, kGiven, U32, U32, U32>(t, name);
  }
  add<[](u a, u b, bool&) { return (a & 0xffff) | b << 16; }, kKeep, U32, U32, U32>(t, "s_pack_ll_b32_b16");
  add<[](u a, u b, bool&) { return (a & 0xffff) | (b & 0xffff0000); }, kKeep, U32, U32, U32>(t, "s_pack_lh_b32_b16");
  add<[](u a, u b, bool&) { return (a >> 16 | (b & 0xffff0000)); }, kKeep, U32, U32, U32>(t, "s_pack_hh_b32_b16");
  add<[](u a, u b, bool&) { return (a >> 16 | b << 16); }, kKeep, U32, U32, U32>(t, "s_pack_hl_b32_b16");
}

void add_fields(Operations& t) {
  using enum Scc;
  add<[](u a, u b, bool&) {
    const u bits = (b >> 16 & 0x7f), field = (a >> (b & 31));
    return (bits >= 32 ? field : field & ((1u << bits) - 1));
  },
      kNonZero, U32, U32, U32>(t, "s_bfe_u32");
  add<[](i a, u b, bool&) {
    const u bits = (b >> 16 & 0x7f);
    const i field = (a >> (b & 31));
    return (bits == 0 ? 0 : bits >= 32 ? field : static_cast<i>(u(field) << (32 - bits)) >> (32 - bits));
  },
      kNonZero, I32, I32, U32>(t, "s_bfe_i32");
  add<[](u a, u b, bool&) { return ((1u << (a & 31)) - 1) << (b & 31); }, kKeep, U32, U32, U32>(t, "s_bfm_b32");
  add<[](u a, bool&) { return a != 0 ? static_cast<u>(std::countl_zero(a)) : kAll; }, kKeep, U32, U32>(t,
                                                                                                       "s_clz_i32_u32");
  add<[](i a, bool&) {
    const int same = a < 0 ? std::countl_one(u(a)) : std::countl_zero(u(a));
    return same == 32 ? -1 : same;
  },
      kKeep, I32, I32>(t, "s_cls_i32");
  add<[](u a, bool&) {
    u r = 0;
    for (int b = 0; b < 32; b++) r |= (a >> b & 1) << (31 - b);
    return r;
  },
      kKeep, U32, U32>(t, "s_brev_b32");
  t.add("s_bitcmp0_b32",
        {compare<[](u a, u b) { return ((a >> (b & 31) & 1) == 0); }, U32>, Class::kSalu, 0, {Type::kU32, Type::kU32}});
  t.add("s_bitcmp1_b32",
        {compare<[](u a, u b) { return ((a >> (b & 31) & 1) == 1); }, U32>, Class::kSalu, 0, {Type::kU32, Type::kU32}});
  add_k<[](u a, u old, bool&) { return old | 1u << (a & 31); }, kKeep, U32, U32, U32>(t, "s_bitset1_b32");
  add_k<[](u a, u old, bool&) { return old & ~(1u << (a & 31)); }, kKeep, U32, U32, U32>(t, "s_bitset0_b32");
}

// RDNA3.5's scalar floats.
void add_floats(Operations& t) {
  using enum Scc;
  add<[](float a, float b, bool&) { return a + b; }, kKeep, F32, F32, F32>(t, "s_add_f32");
  add<[](float a, float b, bool&) { return a - b; }, kKeep, F32, F32, F32>(t, "s_sub_f32");
  add<[](float a, float b, bool&) { return a * b; }, kKeep, F32, F32, F32>(t, "s_mul_f32");
  add<[](float a, float k, float b, bool&) { return std::fma(a, k, b); }, kKeep, F32, F32, F32, F32>(t, "s_fmamk_f32");
  add<[](float a, float b, float k, bool&) { return std::fma(a, b, k); }, kKeep, F32, F32, F32, F32>(t, "s_fmaak_f32");
  add_k<[](float a, float b, float c, bool&) { return std::fma(a, b, c); }, kKeep, F32, F32, F32, F32>(t, "s_fmac_f32");
  add<[](float a, bool&) { return std::trunc(a); }, kKeep, F32, F32>(t, "s_trunc_f32");
  add<[](float a, bool&) { return std::floor(a); }, kKeep, F32, F32>(t, "s_floor_f32");
  add<[](float a, bool&) { return std::ceil(a); }, kKeep, F32, F32>(t, "s_ceil_f32");
  add<[](float a, bool&) { return std::rint(a); }, kKeep, F32, F32>(t, "s_rndne_f32");
  add<[](i a, bool&) { return static_cast<float>(a); }, kKeep, F32, I32>(t, "s_cvt_f32_i32");
  add<[](u a, bool&) { return static_cast<float>(a); }, kKeep, F32, U32>(t, "s_cvt_f32_u32");
  add<[](float a, bool&) {
    return (a != a ? 0 : a >= 0x1p31f ? 0x7fffffff : a <= -0x1p31f ? static_cast<i>(0x80000000) : static_cast<i>(a));
  },
      kKeep, I32, F32>(t, "s_cvt_i32_f32");
  add<[](float a, bool&) { return (!(a > 0)       ? 0
                                   : a >= 0x1p32f ? kAll
                                                  : static_cast<u>(a)); }, kKeep, U32, F32>(
      t, "s_cvt_u32_f32");
}

template <auto Fn>
void branch(Wave& w, const Instruction& in) {
  if (Fn(w)) w.pc = in.target;
}
template <auto Fn>
void add_branch(Operations& t, const char* name, uint16_t reads = 0) {
  Operation op{branch<Fn>, Class::kBranch, 0, {}};
  op.reads = reads;
  t.add(name, op);
}

void nothing(Wave&, const Instruction&) {}
void end(Wave& w, const Instruction&) { w.state = Wave::kEnded; }
void barrier(Wave& w, const Instruction&) { w.state = Wave::kAtBarrier; }
void wait(Wave& w, const Instruction& in) {  // offset: vmcnt, offset1: lgkmcnt
  w.vector_loads.wait(static_cast<size_t>(in.offset));
  w.other_loads.wait(static_cast<size_t>(in.offset1));
  w.outstanding = !w.vector_loads.entries.empty() || !w.other_loads.entries.empty();
}

void get_pc(Wave& w, const Instruction& in) { set_scalar64(w, in.dst, w.group->kernel->image + in.address + in.size); }
void set_pc(Wave& w, const Instruction& in) {
  w.pc = w.group->kernel->index_of(scalar64(w, in.src[0]) - w.group->kernel->image);
}
void swap_pc(Wave& w, const Instruction& in) {
  const uint64_t target = scalar64(w, in.src[0]);
  get_pc(w, in);
  w.pc = w.group->kernel->index_of(target - w.group->kernel->image);
}

}  // namespace

void add_scalar(Operations& t) {
  add_bits<U32>(t, "b32");
  add_bits<U64>(t, "b64");
  add_arithmetic(t);
  add_fields(t);
  add_floats(t);
  add_compares<I32>(t, "i32");
  add_compares<U32>(t, "u32");
  add_compares<U64>(t, "u64");
  add_compares<F32>(t, "f32");
  add_save_exec<[](u s, u e) { return s & e; }>(t, "s_and_saveexec_b32");
  add_save_exec<[](u s, u e) { return s | e; }>(t, "s_or_saveexec_b32");
  add_save_exec<[](u s, u e) { return s ^ e; }>(t, "s_xor_saveexec_b32");
  add_save_exec<[](u s, u e) { return s & ~e; }>(t, "s_and_not1_saveexec_b32");
  add_save_exec<[](u s, u e) { return s | ~e; }>(t, "s_or_not1_saveexec_b32");
  add_save_exec<[](u s, u e) { return ~s & e; }>(t, "s_and_not0_saveexec_b32");
  add_save_exec<[](u s, u e) { return ~s | e; }>(t, "s_or_not0_saveexec_b32");
  add_branch<[](Wave&) { return true; }>(t, "s_branch");
  add_branch<[](Wave& w) { return w.scc; }>(t, "s_cbranch_scc1");
  add_branch<[](Wave& w) { return !w.scc; }>(t, "s_cbranch_scc0");
  add_branch<[](Wave& w) { return w.s[kVcc] != 0; }>(t, "s_cbranch_vccnz", kVcc);
  add_branch<[](Wave& w) { return w.s[kVcc] == 0; }>(t, "s_cbranch_vccz", kVcc);
  add_branch<[](Wave& w) { return w.exec() != 0; }>(t, "s_cbranch_execnz");
  add_branch<[](Wave& w) { return w.exec() == 0; }>(t, "s_cbranch_execz");
  t.add("s_getpc_b64", {get_pc, Class::kSalu, 1, {}});
  t.add("s_setpc_b64", {set_pc, Class::kBranch, 0, {Type::kU64}});
  t.add("s_swappc_b64", {swap_pc, Class::kBranch, 1, {Type::kU64}});
  t.add("s_endpgm", {end, Class::kOther, 0, {}});
  t.add("s_barrier", {barrier, Class::kBarrier, 0, {}});
  t.add("s_waitcnt", {wait, Class::kWait, 0, {}});
  // Stores are done when they are executed, so that waits for them have nothing to do; the rest are hints.
  t.add("s_waitcnt_vscnt", {nothing, Class::kWait, 0, {}});
  t.add("s_waitcnt_depctr", {nothing, Class::kWait, 0, {}});
  for (const char* name : {"s_nop", "s_clause", "s_delay_alu", "s_set_inst_prefetch_distance", "s_sendmsg", "s_sleep",
                           "s_setprio", "buffer_gl0_inv", "buffer_gl1_inv", "s_icache_inv"}) {
    t.add(name, {nothing, Class::kOther, 0, {}});
  }
}

}  // namespace rdna
