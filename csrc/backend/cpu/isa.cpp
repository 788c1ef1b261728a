#include "backend/cpu/isa.h"

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace dflash::cpu {

extern const Kernels kKernels_plain;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2, kKernels_avxvnni, kKernels_avx512vnni, kKernels_amx;
#elif defined(__aarch64__)
extern const Kernels kKernels_neon, kKernels_neon_dotprod, kKernels_neon_i8mm;
#endif

namespace {

#if defined(__x86_64__)
struct CpuFeatures {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false;
};

// Linux gives a process the tile registers only on request.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures read_features() {
  CpuFeatures f;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const auto bit = [](unsigned reg, int i) { return ((reg >> i) & 1u) != 0; };
  if (!bit(c, 27)) return f;  // OSXSAVE: the operating system saves the wide registers
  unsigned xcr0 = 0, xcr0_high = 0;
  asm volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool fma_f16c = bit(c, 12) && bit(c, 29);
  const bool ymm = (xcr0 & 0x6u) == 0x6u, zmm = (xcr0 & 0xe6u) == 0xe6u;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && fma_f16c && bit(b, 5);
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  f.avx512vnni = f.avx2 && zmm && avx512 && bit(c, 11);
  f.amx = f.avx512vnni && (xcr0 & 0x60000u) == 0x60000u && bit(d, 24) && bit(d, 25) && request_tiles();
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avxvnni = f.avx2 && bit(a, 4);
  return f;
}
#elif defined(__aarch64__)
struct CpuFeatures {
  bool dotprod = false, i8mm = false;
};

CpuFeatures read_features() {
  CpuFeatures f;
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  f.dotprod = (getauxval(AT_HWCAP) & kDotprod) != 0;
  f.i8mm = (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__APPLE__)
  const auto has = [](const char* feature) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  f.dotprod = has("hw.optional.arm.FEAT_DotProd");
  f.i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  return f;
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  const CpuFeatures f = read_features();
  // Tiles give the right bits but, with a scale every 32 columns to apply, not more speed (docs/performance.md).
  if (f.avx512vnni) list.push_back(&kKernels_avx512vnni);
  if (f.amx) list.push_back(&kKernels_amx);
  if (f.avxvnni) list.push_back(&kKernels_avxvnni);
  if (f.avx2) list.push_back(&kKernels_avx2);
#elif defined(__aarch64__)
  const CpuFeatures f = read_features();
  if (f.dotprod && f.i8mm) list.push_back(&kKernels_neon_i8mm);
  if (f.dotprod) list.push_back(&kKernels_neon_dotprod);
  list.push_back(&kKernels_neon);
#endif
  list.push_back(&kKernels_plain);
  return list;
}

const Kernels& select_kernels(const std::string& name) {
  const std::vector<const Kernels*> list = available_kernels();
  if (name == "auto") return *list.front();
  std::string names;
  for (const Kernels* k : list) {
    if (name == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  fail("cpu_isa '", name, "' is not available on this CPU. Available: auto, ", names);
}

}  // namespace dflash::cpu

namespace dflash {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

}  // namespace dflash
