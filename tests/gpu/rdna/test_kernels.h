#pragma once
// Kernels of test_rdna.hip: mostly one instruction each, in inline assembly. The host's compile sees their signatures.

#include <hip/hip_runtime.h>

#include <cstdint>

struct Arguments {
  float a;
  int16_t b[3];
  int64_t c;
};

#if defined(__HIP_DEVICE_COMPILE__)
#define RDNA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define RDNA_ASM(...)
#pragma clang diagnostic ignored "-Wunused-variable"  // used by the device's compile alone
#pragma clang diagnostic ignored "-Wunused-parameter"
#endif

// r: holds the output's old value before; a, b, c: a word each
#define RDNA_WORDS(name, ...)                                                                       \
  __global__ void name(const uint32_t* pa, const uint32_t* pb, const uint32_t* pc, uint32_t* out) { \
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;                                       \
    const uint32_t a = pa[i], b = pb[i], c = pc[i];                                                 \
    uint32_t r = out[i];                                                                            \
    (void)a, (void)b, (void)c;                                                                      \
    __VA_ARGS__;                                                                                    \
    out[i] = r;                                                                                     \
  }
#define RDNA_ONE(name, text) RDNA_WORDS(name, RDNA_ASM(text : "+&v"(r) : "v"(a), "v"(b), "v"(c)))

RDNA_ONE(dot4_uu, "v_dot4_i32_iu8 %0, %1, %2, %3")
RDNA_ONE(dot4_iu, "v_dot4_i32_iu8 %0, %1, %2, %3 neg_lo:[1,0,0]")
RDNA_ONE(dot4_ui, "v_dot4_i32_iu8 %0, %1, %2, %3 neg_lo:[0,1,0]")
RDNA_ONE(dot4_ii, "v_dot4_i32_iu8 %0, %1, %2, %3 neg_lo:[1,1,0]")
RDNA_ONE(perm, "v_perm_b32 %0, %1, %2, %3")
RDNA_ONE(alignbit, "v_alignbit_b32 %0, %1, %2, %3")
RDNA_ONE(bfe_i32, "v_bfe_i32 %0, %1, %2, %3")
RDNA_ONE(mad_u24, "v_mad_u32_u24 %0, %1, %2, %3")
RDNA_ONE(minmax_i32, "v_minmax_i32 %0, %1, %2, %3")
RDNA_ONE(ashr_16, "v_mov_b32 %0, %2\n v_ashrrev_i16 %0, %1, %2")
RDNA_ONE(mix_f32, "v_fma_mix_f32 %0, %1, %2, %3 op_sel:[0,1,0] op_sel_hi:[1,1,0]")
RDNA_ONE(mix_signs, "v_fma_mix_f32 %0, -%1, |%2|, -%3 op_sel:[1,0,0] op_sel_hi:[1,0,1]")
RDNA_ONE(to_i32, "v_cvt_i32_f32 %0, %1")
RDNA_ONE(to_u32, "v_cvt_u32_f32 %0, %1")
RDNA_ONE(from_f16, "v_cvt_f32_f16 %0, %1")
RDNA_ONE(max_f32, "v_max_f32 %0, %1, %2")
RDNA_ONE(min_f32, "v_min_f32 %0, %1, %2")
RDNA_ONE(ldexp_f32, "v_ldexp_f32 %0, %1, %2")
RDNA_ONE(rndne, "v_rndne_f32 %0, %1")
// the sum's carry goes into the upper halves' sum
RDNA_ONE(add_64, "v_add_co_u32 %0, vcc_lo, %2, %3\n v_add_co_ci_u32 %0, vcc_lo, %1, %2, vcc_lo")
RDNA_ONE(sub_64, "v_sub_co_u32 %0, vcc_lo, %2, %3\n v_sub_co_ci_u32 %0, vcc_lo, %1, %2, vcc_lo")
RDNA_ONE(subrev_64, "v_subrev_co_u32 %0, vcc_lo, %2, %3\n v_subrev_co_ci_u32 %0, vcc_lo, %1, %2, vcc_lo")
// Results that are NaN have any bits: 0 instead, where the comparison is of halves.
#define RDNA_NAN_AS_0(x) "\n v_cmp_u_f32 vcc_lo, " x ", " x "\n v_cndmask_b32 %0, %0, 0, vcc_lo"
RDNA_WORDS(mixlo, float t = 0; RDNA_ASM("v_fma_mix_f32 %1, %2, %3, %4 op_sel_hi:[1,0,0]\n v_fma_mixlo_f16 %0, %2, %3, "
                                        "%4 op_sel_hi:[1,0,0]" RDNA_NAN_AS_0("%1") : "+&v"(r),
                                        "+&v"(t) : "v"(a), "v"(b), "v"(c) : "vcc"))
RDNA_WORDS(mixhi, float t = 0; RDNA_ASM("v_fma_mix_f32 %1, %2, %3, %4 op_sel_hi:[1,0,0]\n v_fma_mixhi_f16 %0, %2, %3, "
                                        "%4 op_sel_hi:[1,0,0]" RDNA_NAN_AS_0("%1") : "+&v"(r),
                                        "+&v"(t) : "v"(a), "v"(b), "v"(c) : "vcc"))
RDNA_WORDS(to_f16, RDNA_ASM("v_cvt_f16_f32 %0, %1" RDNA_NAN_AS_0("%1") : "+&v"(r) : "v"(a) : "vcc"))
RDNA_WORDS(select_negated,
           RDNA_ASM("v_and_b32 %0, 1, %3\n v_cmp_eq_u32 vcc_lo, 1, %0\n v_cndmask_b32 %0, -%1, |%2|, vcc_lo" : "+&v"(
                        r) : "v"(a),
                    "v"(b), "v"(c) : "vcc"))
RDNA_WORDS(med3, RDNA_ASM("v_med3_f32 %0, %1, %2, %3" : "+&v"(r) : "v"(a), "v"(b), "v"(c));
           const float x = __uint_as_float(a); const float y = __uint_as_float(b); const float z = __uint_as_float(c);
           if (x == 0 || y == 0 || z == 0) r = 0)
RDNA_WORDS(is_special, RDNA_ASM("v_cmp_class_f32 vcc_lo, %1, %2\n v_cndmask_b32 %0, 0, 1, vcc_lo" : "+&v"(r) : "v"(a),
                                "v"(0x67) : "vcc"))
RDNA_WORDS(mad_u64, uint64_t wide = 0; const uint64_t sum = uint64_t{c} << 32 | a;
           RDNA_ASM("v_mad_u64_u32 %0, null, %1, %2, %3" : "=&v"(wide) : "v"(a), "v"(b), "v"(sum));
           r = static_cast<uint32_t>(wide >> 32))
RDNA_WORDS(mad_i64, uint64_t wide = 0; const uint64_t sum = uint64_t{c} << 32 | a;
           RDNA_ASM("v_mad_i64_i32 %0, null, %1, %2, %3" : "=&v"(wide) : "v"(a), "v"(b), "v"(sum));
           r = static_cast<uint32_t>(wide >> 32))
// a dual instruction whose halves each read what the other writes; then b - 3 a, swapped
RDNA_WORDS(dual_swap, RDNA_ASM("v_mov_b32 v4, %1\n v_mov_b32 v5, %2\n v_dual_mov_b32 v4, v5 :: v_dual_mov_b32 v5, v4\n"
                               "v_mul_lo_u32 v4, v4, 3\n v_sub_nc_u32 %0, v5, v4" : "=&v"(r) : "v"(a),
                               "v"(b) : "v4", "v5"))
RDNA_WORDS(
    dual_mixed,
    RDNA_ASM("v_mov_b32 v4, %1\n v_mov_b32 v5, %2\n v_mov_b32 v6, %3\n"
             "v_dual_add_f32 v6, v4, v5 :: v_dual_lshlrev_b32 v5, v5, v6\n v_xor_b32 %0, v6, v5" : "=&v"(r) : "v"(a),
             "v"(b), "v"(c) : "v4", "v5", "v6");
    if (__builtin_isnan(__uint_as_float(a) + __uint_as_float(b))) r = 0)
RDNA_WORDS(divide_f32, r = __float_as_uint(__uint_as_float(a) / __uint_as_float(b)))
RDNA_WORDS(divide_f64_high, const double q = __longlong_as_double(static_cast<long long>(uint64_t{a} << 32 | c)) /
                                             __longlong_as_double(static_cast<long long>(uint64_t{b} << 32 | a));
           r = static_cast<uint32_t>(static_cast<uint64_t>(__double_as_longlong(q)) >> 32); if (q != q) r = 0)
RDNA_WORDS(divide_f64_low, const double q = __longlong_as_double(static_cast<long long>(uint64_t{a} << 32 | c)) /
                                            __longlong_as_double(static_cast<long long>(uint64_t{b} << 32 | a));
           r = static_cast<uint32_t>(__double_as_longlong(q)); if (q != q) r = 0)
// the low result from the low halves, the high one from a's low and the others' high halves; NaN gives 0
RDNA_WORDS(pk_fma, uint32_t t = 0; RDNA_ASM("v_pk_fma_f16 %0, %2, %3, %4 op_sel_hi:[0,1,1]\n v_cmp_u_f16 vcc_lo, %0, "
                                            "%0\n v_lshrrev_b32 %1, 16, %0\n v_cndmask_b32 %0, %0, 0, vcc_lo\n"
                                            "v_cmp_u_f16 vcc_lo, %1, %1\n v_cndmask_b32 %0, %0, 0, vcc_lo" : "=&v"(r),
                                            "=&v"(t) : "v"(a), "v"(b), "v"(c) : "vcc"))

__global__ void scalar_kernel(uint32_t x, uint32_t y, uint32_t* out) {
  uint32_t r[8] = {};
  RDNA_ASM(
      "s_add_u32 %0, %3, %4\n s_addc_u32 %1, %4, %3\n s_sub_u32 %2, %3, %4\n s_sub_u32 %2, %4, %3\n s_subb_u32 %2, %3, "
      "%4" : "=&s"(r[0]),
      "=&s"(r[1]), "=&s"(r[2]) : "s"(y), "s"(x) : "scc");
  RDNA_ASM("s_sub_u32 %0, %2, %1\n s_subb_u32 %0, %1, %2" : "=&s"(r[2]) : "s"(x), "s"(y) : "scc");
  RDNA_ASM("s_mul_hi_i32 %0, %1, %2" : "=s"(r[3]) : "s"(x), "s"(y));
  RDNA_ASM("s_bfe_i32 %0, %1, 0x70001" : "=s"(r[4]) : "s"(x) : "scc");
  RDNA_ASM("s_add_i32 %0, %1, %2\n s_cselect_b32 %0, 1, 0" : "=&s"(r[5]) : "s"(x), "s"(y) : "scc");
  RDNA_ASM("s_ctz_i32_b32 %0, %1" : "=s"(r[6]) : "s"(x));
  RDNA_ASM("s_max_i32 %0, %1, %2" : "=s"(r[7]) : "s"(x), "s"(y) : "scc");
  if (threadIdx.x < 8) out[threadIdx.x] = r[threadIdx.x];
}

#define RDNA_LANES(name, ...)                                    \
  __global__ void name(const uint32_t* in, uint32_t* out) {      \
    const unsigned l = threadIdx.x;                              \
    uint32_t a = in[l];                                          \
    uint32_t r = 55;                                             \
    RDNA_ASM("" : "+v"(a)); /* of all lanes, whatever follows */ \
    (void)a;                                                     \
    __VA_ARGS__;                                                 \
    out[l] = r;                                                  \
  }
#define RDNA_DPP(name, text) RDNA_LANES(name, RDNA_ASM("s_nop 4\n" text : "+&v"(r) : "v"(a)))

RDNA_DPP(dpp_xmask5, "v_mov_b32_dpp %0, %1 row_xmask:5")
RDNA_DPP(dpp_ror3, "v_mov_b32_dpp %0, %1 row_ror:3")
RDNA_DPP(dpp_share6, "v_mov_b32_dpp %0, %1 row_share:6")
RDNA_DPP(dpp_shr1, "v_mov_b32_dpp %0, %1 row_shr:1")
RDNA_DPP(dpp_shl2, "v_mov_b32_dpp %0, %1 row_shl:2 bound_ctrl:1")
RDNA_DPP(dpp_quad, "v_mov_b32_dpp %0, %1 quad_perm:[3,0,2,1]")
RDNA_DPP(dpp_sum, "v_add_nc_u32_dpp %0, %1, %1 row_mirror")
RDNA_DPP(dpp_masks, "v_mov_b32_dpp %0, %1 quad_perm:[1,0,3,2] row_mask:0x1 bank_mask:0xd")
RDNA_LANES(dpp_inactive, if (l % 2 == 0) return; RDNA_ASM("v_mov_b32_dpp %0, %1 row_xmask:1" : "+&v"(r) : "v"(a)))
RDNA_LANES(dpp_fetch, if (l % 2 == 0) return; RDNA_ASM("v_mov_b32_dpp %0, %1 row_xmask:1 fi:1" : "+&v"(r) : "v"(a)))
RDNA_LANES(permlanex16,
           RDNA_ASM("v_permlanex16_b32 %0, %1, %2, %3" : "+&v"(r) : "v"(a), "s"(0x89abcdefu), "s"(0x01234567u)))
RDNA_LANES(permlane16,
           RDNA_ASM("v_permlane16_b32 %0, %1, %2, %3" : "+&v"(r) : "v"(a), "s"(0x87654321u), "s"(0x0fedcba9u)))
RDNA_LANES(bpermute,
           RDNA_ASM("ds_bpermute_b32 %0, %1, %2\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(4 * (5 * l + 3)), "v"(a)))
// odd lanes: those of l % 4 == 1 read an even lane, which is inactive
RDNA_LANES(bpermute_inactive, const unsigned from = l % 4 == 1 ? l + 1 : l + 2; if (l % 2 == 0) return;
           RDNA_ASM("ds_bpermute_b32 %0, %1, %2\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(4 * from), "v"(a)))
RDNA_LANES(swizzle, RDNA_ASM("ds_swizzle_b32 %0, %1 offset:0x241f\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(a)))
RDNA_LANES(read_write_lane, uint32_t s = 0;
           RDNA_ASM("v_mov_b32 %0, %2\n v_readlane_b32 %1, %2, 20\n v_writelane_b32 %0, %1, 9" : "=&v"(r),
                    "=&s"(s) : "v"(a)))
RDNA_LANES(first_of_some, if (l < 11) return; uint32_t s = 0; RDNA_ASM("v_readfirstlane_b32 %0, %1" : "=s"(s) : "v"(a));
           r = s)
RDNA_LANES(compare_some, if (l % 3 != 0) return; uint32_t s = 0; RDNA_ASM("v_cmp_le_u32 %0, 10, %1" : "=s"(s) : "v"(l));
           r = s)
RDNA_LANES(mbcnt, RDNA_ASM("v_mbcnt_lo_u32_b32 %0, %1, 3" : "=v"(r) : "s"(0xf0f0ff11u)))
RDNA_LANES(diverge, r = 1; for (unsigned k = 0; k < l % 7; k++) r = k % 2 ? r * 3 : r + a)

#if defined(__HIP_DEVICE_COMPILE__)
typedef _Float16 half16 __attribute__((ext_vector_type(16)));
typedef short short16 __attribute__((ext_vector_type(16)));
typedef float float8 __attribute__((ext_vector_type(8)));
typedef int int8v __attribute__((ext_vector_type(8)));
typedef int int4v __attribute__((ext_vector_type(4)));
#endif

// Row major 16 x 16 matrices, fragments as AMD's "How to accelerate AI applications on RDNA 3 using WMMA" fills them.
__global__ void wmma_kernel(const float* a, const float* b, const float* c, float* out, float* out_bf16) {
#if defined(__HIP_DEVICE_COMPILE__)
  const int lane = threadIdx.x % 16, upper = threadIdx.x / 16;
  half16 x, y;
  short16 bx, by;
  float8 sum, bsum;
  for (int k = 0; k < 16; k++) {
    x[k] = static_cast<_Float16>(a[16 * lane + k]);
    y[k] = static_cast<_Float16>(b[16 * k + lane]);
    bx[k] = static_cast<short>(__float_as_uint(a[16 * lane + k]) >> 16);
    by[k] = static_cast<short>(__float_as_uint(b[16 * k + lane]) >> 16);
  }
  for (int r = 0; r < 8; r++) bsum[r] = sum[r] = c[16 * (2 * r + upper) + lane];
  sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, sum);
  bsum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(bx, by, bsum);
  for (int r = 0; r < 8; r++) {
    out[16 * (2 * r + upper) + lane] = sum[r];
    out_bf16[16 * (2 * r + upper) + lane] = bsum[r];
  }
#endif
}

__global__ void wmma_int_kernel(const int8_t* a, const int8_t* b, int* out) {
#if defined(__HIP_DEVICE_COMPILE__)
  const int lane = threadIdx.x % 16, upper = threadIdx.x / 16;
  int4v x, y;
  for (int k = 0; k < 4; k++) {
    uint32_t v = 0, w = 0;
    for (int i = 0; i < 4; i++) {
      v |= static_cast<uint32_t>(static_cast<uint8_t>(a[16 * lane + 4 * k + i])) << (8 * i);
      w |= static_cast<uint32_t>(static_cast<uint8_t>(b[16 * (4 * k + i) + lane])) << (8 * i);
    }
    x[k] = static_cast<int>(v);
    y[k] = static_cast<int>(w);
  }
  int8v sum = {0, 0, 0, 0, 0, 0, 0, 0};
  sum = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x, false, y, sum, false);
  for (int r = 0; r < 8; r++) out[16 * (2 * r + upper) + lane] = sum[r];
#endif
}

__global__ void lds_kernel(const uint32_t* in, uint32_t* out) {
  extern __shared__ uint32_t lds[];
  const unsigned t = threadIdx.x;
  lds[t] = in[t];
  lds[t + 128] = in[t + 128];
  __syncthreads();
  uint64_t r = 0;
  // words t + 64 and (t + 65) + 128, both 64-word offsets apart from their own addresses
  const uint32_t first = 4 * ((t + 64) % 128), second = 4 * (128 + (t + 65) % 128);
  uint32_t x = 0, y = 0;
  RDNA_ASM("ds_load_2addr_stride64_b32 %0, %1 offset0:0 offset1:1\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(first));
  x = static_cast<uint32_t>(r);
  RDNA_ASM(
      "ds_load_2addr_stride64_b32 %0, %1 offset0:1 offset1:2\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(second - 512));
  y = static_cast<uint32_t>(r >> 32);
  out[2 * t] = x;
  out[2 * t + 1] = y;
}

// 40 groups of 64: a count, the largest index, a sum; in LDS 64-bit least and largest.
__global__ void atomic_kernel(uint32_t* sums) {
  __shared__ unsigned long long least, largest;
  __shared__ uint32_t total;
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (t == 0) {
    least = ~0ull;
    largest = 0;
    total = 0;
  }
  __syncthreads();
  atomicMin(&least, uint64_t{t} << 32 | 5);
  atomicMax(&largest, uint64_t{t} << 32 | 6);
  atomicAdd(&total, t);
  __syncthreads();
  atomicAdd(&sums[0], 1u);
  atomicMax(&sums[1], i);
  if (t == 0) {
    atomicAdd(&sums[2], total);
    sums[3] = static_cast<uint32_t>(least);
    sums[4] = static_cast<uint32_t>(largest >> 32);
  }
}

__global__ void bytes_kernel(const uint8_t* in, uint8_t* out) {
  int32_t* words = reinterpret_cast<int32_t*>(out);
  words[0] = static_cast<int8_t>(in[2]);
  uint32_t h = 0;
  RDNA_ASM("global_load_i16 %0, %1, off offset:3\n s_waitcnt vmcnt(0)" : "=&v"(h) : "v"(in));
  words[1] = static_cast<int32_t>(h);
  for (int i = 0; i < 12; i++) out[8 + i] = in[3 + i];
}

// Every thread of the grid, at its own index.
__global__ void ids_kernel(Arguments a, uint8_t seven, uint32_t* out) {
  const bool right = a.a == 1.5f && a.b[0] == 1 && a.b[1] == 2 && a.b[2] == 3 && a.c == 40000000000ll && seven == 7;
  const unsigned group = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = group * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = right ? i : 0xffffffffu;
}

// ---- what the interpreter has to find; 64 threads, 64 words each way

__global__ void fault_none(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void fault_read(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[threadIdx.x + 2]; }
__global__ void fault_write(const uint32_t* in, uint32_t* out) { out[2 * threadIdx.x + 2] = in[threadIdx.x]; }
__global__ void fault_lds(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t lds[64];
  lds[threadIdx.x + in[0]] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = lds[threadIdx.x];
}
__global__ void fault_wait(const uint32_t* in, uint32_t* out) {
  uint32_t r = 0;
  RDNA_ASM(
      "global_load_b32 %0, %1, off\n v_add_nc_u32 %0, 1, %0\n s_waitcnt vmcnt(0)" : "=&v"(r) : "v"(in + threadIdx.x));
  out[threadIdx.x] = r;
}
__global__ void fault_wait_lds(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t lds[64];
  lds[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  uint32_t r = 0;
  RDNA_ASM("ds_load_b32 %0, %1\n v_add_nc_u32 %0, 1, %0\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(4 * threadIdx.x));
  out[threadIdx.x] = r + lds[0];
}
__global__ void fault_wait_count(const uint32_t* in,
                                 uint32_t* out) {  // the first of two loads may be read, the second not
  uint32_t r = 0, s = 0;
  RDNA_ASM(
      "s_waitcnt vmcnt(0)\n global_load_b32 %0, %2, off\n global_load_b32 %1, %2, off\n s_waitcnt vmcnt(1)\n "
      "v_add_nc_u32 %0, 1, %0\n v_add_nc_u32 %1, 1, %1\n s_waitcnt vmcnt(0)" : "=&v"(r),
      "=&v"(s) : "v"(in + threadIdx.x));
  out[threadIdx.x] = r + s;
}
__global__ void fault_barrier(const uint32_t* in, uint32_t* out) {
  RDNA_ASM("ds_store_b32 %0, %1\n s_barrier\n s_waitcnt lgkmcnt(0)" ::"v"(4 * (threadIdx.x & 15)),
           "v"(in[threadIdx.x]));
  __shared__ uint32_t lds[64];
  lds[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = lds[63 - threadIdx.x];
}
__global__ void fault_race(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t lds[64];
  volatile uint32_t* p = lds;
  p[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = p[63 - threadIdx.x];  // the other wave's
}
__global__ void fault_unknown(const uint32_t* in, uint32_t* out) {
  uint32_t r = 0;
  RDNA_ASM("v_cvt_off_f32_i4 %0, %1" : "=v"(r) : "v"(in[threadIdx.x]));
  out[threadIdx.x] = r;
}
__global__ void fault_wmma(const uint32_t* in, uint32_t* out) {
#if defined(__HIP_DEVICE_COMPILE__)
  int4v x = {static_cast<int>(threadIdx.x), 0, 0, 0}, y = {static_cast<int>(in[0]), 0, 0, 0};
  int8v sum = {0, 0, 0, 0, 0, 0, 0, 0};
  sum = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x, true, y, sum, false);
  out[threadIdx.x] = static_cast<uint32_t>(sum[0]);
#endif
}
__global__ void fault_misaligned(const uint32_t* in, uint32_t* out) {
  uint32_t r = 0;
  RDNA_ASM("global_load_b32 %0, %1, off offset:2\n s_waitcnt vmcnt(0)" : "=&v"(r) : "v"(in));
  out[threadIdx.x] = r;
}
