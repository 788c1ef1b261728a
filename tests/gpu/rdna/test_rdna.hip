// The interpreter's instructions, one by one in inline assembly, against C++ that knows nothing of it. On real hardware
// (gfx11) the same program tests that the references are what the hardware does, less the faults.

#include <dlfcn.h>
#include <hip/hip_runtime.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../../cpp/check.h"
#include "test_kernels.h"

using namespace dflash;

namespace {

constexpr int kThreads = 256, kCount = 1 << 16;

void ok(hipError_t e) {
  if (e != hipSuccess) fail("HIP: ", hipGetErrorName(e), " ", hipGetErrorString(e));
}

template <typename T>
class Device {
 public:
  explicit Device(size_t n) : n_(n) { ok(hipMalloc(reinterpret_cast<void**>(&p_), n * sizeof(T))); }
  explicit Device(const std::vector<T>& v) : Device(v.size()) {
    ok(hipMemcpyAsync(p_, v.data(), n_ * sizeof(T), hipMemcpyHostToDevice, nullptr));
  }
  ~Device() { (void)hipFree(p_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* data() const { return p_; }
  std::vector<T> read() const {
    std::vector<T> v(n_);
    ok(hipMemcpyAsync(v.data(), p_, n_ * sizeof(T), hipMemcpyDeviceToHost, nullptr));
    ok(hipStreamSynchronize(nullptr));
    return v;
  }

 private:
  size_t n_;
  T* p_ = nullptr;
};

template <typename To, typename From>
To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
float f(uint32_t v) { return as<float>(v); }
uint32_t u(float v) { return as<uint32_t>(v); }
float half(uint32_t v) { return static_cast<float>(as<_Float16>(static_cast<uint16_t>(v))); }
uint32_t to_half(double v) { return as<uint16_t>(static_cast<_Float16>(v)); }

// Random bits, among them floats of all sizes, halves, small integers and every special value.
std::vector<uint32_t> inputs(uint32_t seed, size_t n = kCount) {
  std::mt19937 rng(seed);
  const std::vector<uint32_t> special = {0,           0x80000000u, 1,           0xffffffffu, 0x7fffffffu, 0x7f800000u,
                                         0xff800000u, 0x7fc00000u, 0xffc12345u, 0x00000001u, 0x807fffffu, 0x00800000u,
                                         0x7f7fffffu, 0x3f800000u, 0xbf800000u, 0x4f000000u, 0xcf000000u, 0x4f800000u,
                                         0x477ff000u, 0x33800000u, 0x7c007c00u, 0xfc000001u};
  std::vector<uint32_t> v(n);
  for (uint32_t& x : v) {
    switch (rng() % 4) {
      case 0:
        x = special[rng() % special.size()];
        break;
      case 1:
        x = rng();
        break;
      case 2:
        x = u(std::ldexp(static_cast<float>(static_cast<int32_t>(rng())), -31 + static_cast<int>(rng() % 12)));
        break;
      default:
        x = rng() % 64;
        break;
    }
  }
  return v;
}

bool same_float(uint32_t a, uint32_t b) { return a == b || (f(a) != f(a) && f(b) != f(b)); }

using Reference = std::function<uint32_t(uint32_t a, uint32_t b, uint32_t c, uint32_t old)>;

// A kernel of three words to one, on random words. is_float: any NaN is as good as another.
void test_words(const char* name, void (*kernel)(const uint32_t*, const uint32_t*, const uint32_t*, uint32_t*),
                Reference reference, bool is_float = false) {
  const std::vector<uint32_t> a = inputs(1), b = inputs(2), c = inputs(3), old(kCount, 0xabcd1234u);
  const Device<uint32_t> da(a), db(b), dc(c), out(old);
  kernel<<<kCount / kThreads, kThreads>>>(da.data(), db.data(), dc.data(), out.data());
  const std::vector<uint32_t> r = out.read();
  int wrong = 0;
  for (size_t i = 0; i < r.size(); i++) {
    const uint32_t want = reference(a[i], b[i], c[i], old[i]);
    if ((is_float ? same_float(r[i], want) : r[i] == want)) continue;
    if (wrong++ == 0) std::printf("%s(%08x, %08x, %08x) = %08x, expected %08x\n", name, a[i], b[i], c[i], r[i], want);
  }
  test::record(wrong == 0, name, __FILE__, __LINE__);
}

int dot4(uint32_t a, uint32_t b, int c, bool sa, bool sb) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int k = 0; k < 32; k += 8) {
    const int x = sa ? static_cast<int8_t>(a >> k) : static_cast<uint8_t>(a >> k),
              y = sb ? static_cast<int8_t>(b >> k) : static_cast<uint8_t>(b >> k);
    sum += static_cast<uint32_t>(x * y);
  }
  return static_cast<int>(sum);
}

void test_integers() {
  using W = uint32_t;
  for (int signs = 0; signs < 4; signs++) {
    test_words("v_dot4_i32_iu8",
               signs == 0   ? dot4_uu
               : signs == 1 ? dot4_iu
               : signs == 2 ? dot4_ui
                            : dot4_ii,
               [=](W a, W b, W c, W) { return static_cast<W>(dot4(a, b, static_cast<int>(c), signs & 1, signs & 2)); });
  }
  test_words("v_perm_b32", perm, [](W a, W b, W c, W) {
    const uint64_t bytes = uint64_t{a} << 32 | b;
    W r = 0;
    for (int k = 0; k < 32; k += 8) {
      const W s = c >> k & 255;
      const W v = s > 12    ? 255
                  : s == 12 ? 0
                  : s < 8   ? bytes >> (8 * s) & 255
                            : (bytes >> (16 * (s - 8) + 15) & 1) * 255;
      r |= v << k;
    }
    return r;
  });
  test_words("v_alignbit_b32", alignbit,
             [](W a, W b, W c, W) { return static_cast<W>((uint64_t{a} << 32 | b) >> (c % 32)); });
  test_words("v_bfe_i32", bfe_i32, [](W a, W b, W c, W) {
    const W width = c % 32;
    if (width == 0) return W{0};
    int64_t v = static_cast<int32_t>(a) >> (b % 32);  // sign first, then the field
    v &= (int64_t{1} << width) - 1;
    return static_cast<W>(v >= int64_t{1} << (width - 1) ? v - (int64_t{1} << width) : v);
  });
  test_words("v_mad_u32_u24", mad_u24, [](W a, W b, W c, W) { return a % (1 << 24) * (b % (1 << 24)) + c; });
  test_words("v_minmax_i32", minmax_i32, [](W a, W b, W c, W) {
    return static_cast<W>(std::max(std::min(static_cast<int>(a), static_cast<int>(b)), static_cast<int>(c)));
  });
  test_words("64 bit sum", add_64, [](W a, W b, W c, W) {
    return static_cast<W>(((uint64_t{a} << 32 | b) + (uint64_t{b} << 32 | c)) >> 32);
  });
  test_words("64 bit difference", sub_64, [](W a, W b, W c, W) {
    return static_cast<W>(((uint64_t{a} << 32 | b) - (uint64_t{b} << 32 | c)) >> 32);
  });
  test_words("64 bit difference, reversed", subrev_64, [](W a, W b, W c, W) {
    return static_cast<W>(((uint64_t{b} << 32 | c) - (uint64_t{a} << 32 | b)) >> 32);
  });
  test_words("v_mad_u64_u32", mad_u64,
             [](W a, W b, W c, W) { return static_cast<W>((uint64_t{a} * b + (uint64_t{c} << 32 | a)) >> 32); });
  test_words("v_mad_i64_i32", mad_i64, [](W a, W b, W c, W) {
    return static_cast<W>(
        (static_cast<uint64_t>(int64_t{static_cast<int32_t>(a)} * static_cast<int32_t>(b)) + (uint64_t{c} << 32 | a)) >>
        32);
  });
  test_words("v_ashrrev_i16 keeps the upper half", ashr_16, [](W a, W b, W, W) {
    return (b & 0xffff0000) | static_cast<uint16_t>(static_cast<int16_t>(b) >> (a % 16));
  });
  test_words("v_dual_mov_b32 swaps", dual_swap, [](W a, W b, W, W) { return a - 3 * b; });
  test_words("v_dual_add, v_dual_lshlrev", dual_mixed,
             [](W a, W b, W c, W) { return std::isnan(f(a) + f(b)) ? 0 : u(f(a) + f(b)) ^ (c << (b % 32)); });
}

void test_floats() {
  using W = uint32_t;
  test_words(
      "v_fma_mix_f32", mix_f32, [](W a, W b, W c, W) { return u(std::fma(half(a), half(b >> 16), f(c))); }, true);
  test_words(
      "v_fma_mix_f32, signs", mix_signs,
      [](W a, W b, W c, W) { return u(std::fma(-half(a >> 16), std::fabs(f(b)), -half(c))); }, true);
  test_words("v_fma_mixlo_f16", mixlo, [](W a, W b, W c, W old) {
    const float r = std::fma(half(a), f(b), f(c));
    return std::isnan(r) ? 0 : (old & 0xffff0000) | to_half(r);
  });
  test_words("v_fma_mixhi_f16", mixhi, [](W a, W b, W c, W old) {
    const float r = std::fma(half(a), f(b), f(c));
    return std::isnan(r) ? 0 : (old & 0xffff) | to_half(r) << 16;
  });
  test_words("v_cndmask_b32 with signs", select_negated,
             [](W a, W b, W c, W) { return c & 1 ? (b & 0x7fffffff) : a ^ 0x80000000; });
  test_words("v_cvt_f16_f32", to_f16,
             [](W a, W, W, W old) { return std::isnan(f(a)) ? 0 : (old & 0xffff0000) | to_half(f(a)); });
  test_words("v_cvt_f32_f16", from_f16, [](W a, W, W, W) { return u(half(a)); }, true);
  const auto to_int = [](W a) {
    const double v = f(a);
    return v != v               ? 0
           : v >= 2147483647.0  ? 2147483647
           : v <= -2147483648.0 ? static_cast<int>(0x80000000)
                                : static_cast<int>(v);
  };
  test_words("v_cvt_i32_f32", to_i32, [=](W a, W, W, W) { return static_cast<W>(to_int(a)); });
  test_words("v_cvt_u32_f32", to_u32, [](W a, W, W, W) {
    const double v = f(a);
    return !(v > 0) ? 0 : v >= 4294967295.0 ? 0xffffffffu : static_cast<W>(v);
  });
  test_words(
      "v_med3_f32", med3,
      [](W a, W b, W c, W) {
        float v[3] = {f(a), f(b), f(c)};
        if (v[0] == 0 || v[1] == 0 || v[2] == 0) return W{0};  // the sign of a zero is not compared
        if (v[0] != v[0] || v[1] != v[1] || v[2] != v[2]) return u(std::fmin(std::fmin(v[0], v[1]), v[2]));
        std::sort(v, v + 3);
        return u(v[1]);
      },
      true);
  test_words(
      "v_max_f32", max_f32, [](W a, W b, W, W) { return f(a) == 0 && f(b) == 0 ? a & b : u(std::fmax(f(a), f(b))); },
      true);
  test_words(
      "v_min_f32", min_f32, [](W a, W b, W, W) { return f(a) == 0 && f(b) == 0 ? a | b : u(std::fmin(f(a), f(b))); },
      true);
  test_words("v_ldexp_f32", ldexp_f32, [](W a, W b, W, W) { return u(std::ldexp(f(a), static_cast<int>(b))); }, true);
  test_words("v_rndne_f32", rndne, [](W a, W, W, W) { return u(std::nearbyint(f(a))); }, true);
  test_words("division of floats", divide_f32, [](W a, W b, W, W) { return u(f(a) / f(b)); }, true);
  test_words("division of doubles, upper half", divide_f64_high, [](W a, W b, W c, W) {
    const double q = as<double>(uint64_t{a} << 32 | c) / as<double>(uint64_t{b} << 32 | a);
    return q != q ? 0 : static_cast<W>(as<uint64_t>(q) >> 32);
  });
  test_words("division of doubles, lower half", divide_f64_low, [](W a, W b, W c, W) {
    const double q = as<double>(uint64_t{a} << 32 | c) / as<double>(uint64_t{b} << 32 | a);
    return q != q ? 0 : static_cast<W>(as<uint64_t>(q));
  });
  test_words("v_pk_fma_f16", pk_fma, [](W a, W b, W c, W) {
    const double low = double{half(a)} * half(b) + half(c), high = double{half(a)} * half(b >> 16) + half(c >> 16);
    return std::isnan(low) || std::isnan(high) ? 0 : to_half(low) | to_half(high) << 16;
  });
  test_words("v_cmp_class_f32", is_special,
             [](W a, W, W, W) { return std::isnan(f(a)) || f(a) == -INFINITY || f(a) == 0 ? 1u : 0u; });
}

void test_scalars() {
  using W = uint32_t;
  const std::vector<uint32_t> a = inputs(4, 64), b = inputs(5, 64);
  const Device<uint32_t> out(8);
  for (size_t i = 0; i < a.size(); i++) {
    const W x = a[i], y = b[i];
    scalar_kernel<<<1, 32>>>(x, y, out.data());
    const std::vector<uint32_t> r = out.read();
    const int64_t wide = int64_t{static_cast<int32_t>(x)} * static_cast<int32_t>(y);
    CHECK(r[0] == static_cast<W>((uint64_t{x} << 32 | y) + (uint64_t{y} << 32 | x)));
    CHECK(r[1] == static_cast<W>(((uint64_t{x} << 32 | y) + (uint64_t{y} << 32 | x)) >> 32));
    CHECK(r[2] == static_cast<W>(((uint64_t{x} << 32 | y) - (uint64_t{y} << 32 | x)) >> 32));
    CHECK(r[3] == static_cast<W>(wide >> 32));
    CHECK(r[4] == static_cast<W>(static_cast<int32_t>(x << 24) >> 25));  // s_bfe_i32: 7 bits from bit 1
    const int64_t sum = int64_t{static_cast<int32_t>(x)} + static_cast<int32_t>(y);
    CHECK(r[5] == (sum != static_cast<int32_t>(sum) ? 1u : 0u));  // SCC of s_add_i32: signed overflow
    CHECK(r[6] == (x == 0 ? 0xffffffffu : static_cast<W>(__builtin_ctz(x))));
    CHECK(r[7] == (static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y));
  }
}

template <typename F>
void test_lanes(const char* name, void (*kernel)(const uint32_t*, uint32_t*), F from) {
  std::vector<uint32_t> in(32);
  for (uint32_t l = 0; l < 32; l++) in[l] = 100 + l;
  const Device<uint32_t> din(in), out(std::vector<uint32_t>(32, 7));
  kernel<<<1, 32>>>(din.data(), out.data());
  const std::vector<uint32_t> r = out.read();
  bool right = true;
  for (int l = 0; l < 32; l++) {
    const uint32_t want = from(l);
    if (right && r[static_cast<size_t>(l)] != want)
      std::printf("%s: lane %d holds %u, expected %u\n", name, l, r[static_cast<size_t>(l)], want);
    right = right && r[static_cast<size_t>(l)] == want;
  }
  test::record(right, name, __FILE__, __LINE__);
}

void test_lane_moves() {
  const auto lane = [](int l) { return static_cast<uint32_t>(100 + l); };
  test_lanes("row_xmask:5", dpp_xmask5, [=](int l) { return lane(l ^ 5); });
  test_lanes("row_ror:3", dpp_ror3, [=](int l) { return lane((l & 16) + (l + 13) % 16); });
  test_lanes("row_share:6", dpp_share6, [=](int l) { return lane((l & 16) + 6); });
  test_lanes("row_shr:1, old value", dpp_shr1, [=](int l) { return l % 16 == 0 ? 55 : lane(l - 1); });
  test_lanes("row_shl:2, bound_ctrl", dpp_shl2, [=](int l) { return l % 16 >= 14 ? 0 : lane(l + 2); });
  test_lanes("quad_perm:[3,0,2,1]", dpp_quad, [=](int l) {
    return lane((l & ~3) + (l % 4 == 0 ? 3 : l % 4 == 1 ? 0 : l % 4 == 2 ? 2 : 1));
  });
  test_lanes("row_mirror in a sum", dpp_sum, [=](int l) { return lane(l) + lane((l & 16) + 15 - l % 16); });
  test_lanes("DPP, row_mask and bank_mask", dpp_masks,
             [=](int l) { return l < 16 && l % 16 / 4 != 1 ? lane(l ^ 1) : 55; });
  // odd lanes alone are active: a source that is not keeps the old value, or reads 0
  test_lanes("DPP of inactive lanes", dpp_inactive, [=](int l) { return l % 2 == 0 ? 7u : 55u; });
  test_lanes("DPP of inactive lanes, fi", dpp_fetch, [=](int l) { return l % 2 == 0 ? 7u : lane(l ^ 1); });
  test_lanes("v_permlanex16_b32", permlanex16, [=](int l) { return lane((l ^ 16) / 16 * 16 + 15 - l % 16); });
  test_lanes("v_permlane16_b32", permlane16, [=](int l) { return lane((l & 16) + (l + 1) % 16); });
  test_lanes("ds_bpermute_b32", bpermute, [=](int l) { return lane((5 * l + 3) % 32); });
  test_lanes("ds_bpermute_b32 of inactive lanes", bpermute_inactive, [=](int l) {
    return l % 2 == 0 ? 7 : l % 4 == 1 ? 0 : lane((l + 2) % 32);
  });
  test_lanes("ds_swizzle_b32", swizzle, [=](int l) { return lane(l ^ 9); });
  test_lanes("v_readlane, v_writelane", read_write_lane, [=](int l) { return l == 9 ? lane(20) : lane(l); });
  test_lanes("v_readfirstlane_b32 of some", first_of_some, [=](int l) { return l < 11 ? 7 : lane(11); });
  uint32_t compared = 0;  // every third lane compares itself with 10
  for (int k = 12; k < 32; k += 3) compared |= 1u << k;
  test_lanes("v_cmp of inactive lanes", compare_some, [=](int l) { return l % 3 == 0 ? compared : 7; });
  test_lanes("v_mbcnt_lo_u32_b32", mbcnt,
             [](int l) { return static_cast<uint32_t>(3 + __builtin_popcount(0xf0f0ff11u & ((1u << l) - 1))); });
  test_lanes("loop of different lengths", diverge, [=](int l) {
    uint32_t v = 1;
    for (int k = 0; k < l % 7; k++) v = k % 2 ? v * 3 : v + lane(l);
    return v;
  });
}

void test_matrix() {
  std::mt19937 rng(9);
  std::vector<float> a(256), b(256), c(256);
  std::vector<int8_t> ai(256), bi(256);
  for (int i = 0; i < 256; i++) {  // small integers: exact in every type and order
    a[static_cast<size_t>(i)] = static_cast<float>(static_cast<int>(rng() % 17) - 8);
    b[static_cast<size_t>(i)] = static_cast<float>(static_cast<int>(rng() % 17) - 8);
    c[static_cast<size_t>(i)] = static_cast<float>(static_cast<int>(rng() % 100));
    ai[static_cast<size_t>(i)] = static_cast<int8_t>(rng());
    bi[static_cast<size_t>(i)] = static_cast<int8_t>(rng());
  }
  const Device<float> da(a), db(b), dc(c), out(256), out_bf16(256);
  const Device<int8_t> dai(ai), dbi(bi);
  const Device<int> out_int(256);
  wmma_kernel<<<1, 32>>>(da.data(), db.data(), dc.data(), out.data(), out_bf16.data());
  wmma_int_kernel<<<1, 32>>>(dai.data(), dbi.data(), out_int.data());
  const std::vector<float> d = out.read(), e = out_bf16.read();
  const std::vector<int> g = out_int.read();
  for (size_t m = 0; m < 16; m++) {
    for (size_t n = 0; n < 16; n++) {
      float want = c[16 * m + n];
      int want_int = 0;
      for (size_t k = 0; k < 16; k++) {
        want += a[16 * m + k] * b[16 * k + n];
        want_int += ai[16 * m + k] * static_cast<uint8_t>(bi[16 * k + n]);  // signed by unsigned
      }
      CHECK(d[16 * m + n] == want);
      CHECK(e[16 * m + n] == want);
      CHECK(g[16 * m + n] == want_int);
    }
  }
}

void test_memory() {
  std::vector<uint32_t> in(1024);
  for (uint32_t i = 0; i < 1024; i++) in[i] = i * 2654435761u;
  const Device<uint32_t> din(in), out(256), sums(std::vector<uint32_t>(6, 5));
  lds_kernel<<<1, 128, 4096>>>(din.data(), out.data());
  const std::vector<uint32_t> r = out.read();
  for (uint32_t i = 0; i < 128; i++) {
    CHECK(r[2 * i] == in[(i + 64) % 128]);  // ds_load_2addr_stride64_b32: 64 words on
    CHECK(r[2 * i + 1] == in[128 + (i + 65) % 128]);
  }
  atomic_kernel<<<40, 64>>>(sums.data());
  const std::vector<uint32_t> s = sums.read();
  CHECK(s[0] == 5 + 2560 && s[1] == 2559 && s[2] == 5 + 40 * 2016);
  CHECK(s[3] == 5 && s[4] == 63);
  const Device<uint8_t> bytes(64);
  bytes_kernel<<<1, 1>>>(reinterpret_cast<const uint8_t*>(din.data()) + 1, bytes.data());
  const std::vector<uint8_t> q = bytes.read();
  const auto* src = reinterpret_cast<const uint8_t*>(in.data()) + 1;
  int32_t signed_byte, signed_half;
  std::memcpy(&signed_byte, q.data(), 4);
  std::memcpy(&signed_half, q.data() + 4, 4);
  CHECK(signed_byte == static_cast<int8_t>(src[2]));
  CHECK(signed_half == static_cast<int16_t>(src[3] | src[4] << 8));
  CHECK(std::memcmp(q.data() + 8, src + 3, 12) == 0);
}

void test_arguments() {
  const Device<uint32_t> out(std::vector<uint32_t>(3 * 2 * 2 * 4 * 2 * 3, 0));
  ids_kernel<<<dim3(3, 2, 2), dim3(4, 2, 3)>>>(Arguments{1.5f, {1, 2, 3}, 40000000000ll}, 7, out.data());
  const std::vector<uint32_t> r = out.read();
  for (uint32_t i = 0; i < r.size(); i++) CHECK(r[i] == i);
}

// What the interpreter has to find.
void test_faults() {
  void* library = dlopen("libamdhip64.so.7", RTLD_NOW);
  const auto take =
      library == nullptr ? nullptr : reinterpret_cast<const char* (*)()>(dlsym(library, "rdna_take_fault"));
  if (take == nullptr) {
    std::printf("not the interpreter: faults are not tested\n");
    return;
  }
  const auto set = reinterpret_cast<int (*)(const char*, const char*)>(dlsym(library, "rdna_set"));
  const Device<uint32_t> in(std::vector<uint32_t>(64, 1)), out(64);
  const auto finds = [&](const char* what, void (*kernel)(const uint32_t*, uint32_t*), const char* text) {
    kernel<<<1, 64>>>(in.data(), out.data());
    const std::string said = take();
    if (text == nullptr ? !said.empty() : said.find(text) == std::string::npos)
      std::printf("%s: said '%s'\n", what, said.c_str());
    test::record(text == nullptr ? said.empty() : said.find(text) != std::string::npos, what, __FILE__, __LINE__);
    ok(hipStreamSynchronize(nullptr));
  };
  finds("no fault", fault_none, nullptr);
  finds("read behind an allocation", fault_read, "lane 30: reads 4 bytes at");
  finds("write behind an allocation", fault_write, "lane 31: writes 4 bytes at");
  finds("LDS behind the group's", fault_lds, "the work group has 256");
  finds("a load not waited for", fault_wait, "outstanding load still writes (vmcnt)");
  finds("an LDS load not waited for", fault_wait_lds, "outstanding load still writes (lgkmcnt)");
  finds("a wait that is one too few", fault_wait_count, "outstanding load still writes (vmcnt)");
  finds("a barrier too early", fault_barrier, "a barrier before the wave's accesses of LDS are done");
  finds("a missing barrier", fault_race, "race: wave 1 writes byte 128 of LDS, which wave 0 reads");
  finds("an instruction that is not modelled", fault_unknown, "v_cvt_off_f32_i4");
  finds("WMMA with half a wave's operand", fault_wmma, "lanes 16..31");
  set("check_alignment", "1");
  finds("a misaligned load", fault_misaligned, "is not aligned to 4");
  set("check_alignment", "0");
  finds("a misaligned load that is allowed", fault_misaligned, nullptr);
  // With waves the other way round, what the missing barrier leaves undone shows in the result.
  set("check_races", "0");
  fault_race<<<1, 64>>>(in.data(), out.data());
  const std::vector<uint32_t> forward = out.read();
  set("reverse_waves", "1");
  fault_race<<<1, 64>>>(in.data(), out.data());
  CHECK(out.read() != forward);
  set("reverse_waves", "0");
  set("check_races", "1");
}

}  // namespace

int main() try {
  int n = 0;
  if (hipGetDeviceCount(&n) != hipSuccess || n == 0) {
    std::printf("no device\n");
    return 77;  // skipped
  }
  test_integers();
  test_floats();
  test_scalars();
  test_lane_moves();
  test_matrix();
  test_memory();
  test_arguments();
  test_faults();
  return test::report("test_rdna");
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_rdna: %s\n", e.what());
  return 2;
}
