// A HIP runtime with one device and no hardware, so that what a driver may answer can be tested where none is. It is
// built as libamdhip64 and found by the loader in place of the real one. Memory is the host's; kernels do nothing.

#include <hip/hip_runtime_api.h>

#include <cstdlib>
#include <cstring>

namespace {

struct Fake {
  int devices = 1;
  int major = 11, minor = 5;              // gfx1151
  size_t free = size_t{1} << 30;          // bytes
  hipError_t next_sync = hipSuccess;      // what an asynchronous fault shows up as
  hipError_t kernels_there = hipSuccess;  // of hipFuncGetAttributes
};

Fake& fake() {
  static Fake f;
  return f;
}

}  // namespace

// The test's hand on it.
extern "C" void fake_hip_set(const char* what, long value) {
  Fake& f = fake();
  if (std::strcmp(what, "devices") == 0) f.devices = static_cast<int>(value);
  if (std::strcmp(what, "major") == 0) f.major = static_cast<int>(value);
  if (std::strcmp(what, "minor") == 0) f.minor = static_cast<int>(value);
  if (std::strcmp(what, "free") == 0) f.free = static_cast<size_t>(value);
  if (std::strcmp(what, "next_sync") == 0) f.next_sync = static_cast<hipError_t>(value);
  if (std::strcmp(what, "kernels_there") == 0) f.kernels_there = static_cast<hipError_t>(value);
}

extern "C" {

const char* hipGetErrorName(hipError_t) { return "hipErrorFake"; }
const char* hipGetErrorString(hipError_t) { return "said by the fake runtime"; }
hipError_t hipGetLastError() { return hipSuccess; }
hipError_t hipGetDeviceCount(int* n) {
  *n = fake().devices;
  return *n > 0 ? hipSuccess : hipErrorNoDevice;
}
hipError_t hipSetDevice(int) { return hipSuccess; }
hipError_t hipDeviceGetName(char* name, int n, hipDevice_t) {
  std::strncpy(name, "fake device", static_cast<size_t>(n));
  return hipSuccess;
}
hipError_t hipDeviceGetAttribute(int* v, hipDeviceAttribute_t a, int) {
  *v = a == hipDeviceAttributeComputeCapabilityMajor   ? fake().major
       : a == hipDeviceAttributeComputeCapabilityMinor ? fake().minor
       : a == hipDeviceAttributeMultiprocessorCount    ? 20  // HIP counts work-group processors
                                                       : 0;
  return hipSuccess;
}
hipError_t hipMalloc(void** p, size_t n) {
  if (n > fake().free) return hipErrorOutOfMemory;
  *p = std::malloc(n);
  return hipSuccess;
}
hipError_t hipFree(void* p) {
  std::free(p);
  return hipSuccess;
}
hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  *free = fake().free;
  *total = size_t{1} << 31;
  return hipSuccess;
}
hipError_t hipHostMalloc(void** p, size_t n, unsigned) {
  *p = std::aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  return hipSuccess;
}
hipError_t hipHostFree(void* p) { return hipFree(p); }
hipError_t hipMemcpyAsync(void* d, const void* s, size_t n, hipMemcpyKind, hipStream_t) {
  std::memcpy(d, s, n);
  return hipSuccess;
}
hipError_t hipMemsetAsync(void* d, int v, size_t n, hipStream_t) {
  std::memset(d, v, n);
  return hipSuccess;
}
hipError_t hipStreamCreateWithFlags(hipStream_t* s, unsigned) {
  *s = reinterpret_cast<hipStream_t>(&fake());
  return hipSuccess;
}
hipError_t hipStreamSynchronize(hipStream_t) {
  const hipError_t status = fake().next_sync;
  fake().next_sync = hipSuccess;  // unlike CUDA's, HIP's errors need not stay
  return status;
}
hipError_t hipStreamDestroy(hipStream_t) { return hipSuccess; }
hipError_t hipEventCreateWithFlags(hipEvent_t* e, unsigned) {
  *e = reinterpret_cast<hipEvent_t>(&fake());
  return hipSuccess;
}
hipError_t hipEventRecord(hipEvent_t, hipStream_t) { return hipSuccess; }
hipError_t hipEventSynchronize(hipEvent_t) { return hipSuccess; }
hipError_t hipEventDestroy(hipEvent_t) { return hipSuccess; }
hipError_t hipFuncGetAttributes(hipFuncAttributes*, const void*) { return fake().kernels_there; }
hipError_t hipLaunchKernel(const void*, dim3, dim3, void**, size_t, hipStream_t) { return hipSuccess; }
hipError_t __hipPushCallConfiguration(dim3, dim3, size_t, hipStream_t) { return hipSuccess; }
hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* lds, hipStream_t* stream) {
  *grid = *block = dim3(1);
  *lds = 0;
  *stream = nullptr;
  return hipSuccess;
}
void** __hipRegisterFatBinary(const void*) { return reinterpret_cast<void**>(&fake()); }
void __hipRegisterFunction(void**, const void*, char*, const char*, unsigned, void*, void*, void*, void*, int*) {}
void __hipUnregisterFatBinary(void**) {}

}  // extern "C"
