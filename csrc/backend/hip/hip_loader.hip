// The HIP runtime, opened when it is first needed. A wheel with this backend must import on a machine that has neither
// GPU nor driver, so nothing here may link libamdhip64: these definitions stand in for it and pass calls on. Kernels
// register themselves while the library is loaded; that is noted and handed over when the runtime is there.
//
// What is process-wide here is the runtime itself, which is so anyway.

#include <dlfcn.h>

#include <mutex>
#include <vector>

#include "backend/hip/gpu.h"

namespace {

struct Kernel {
  const void* host;
  const char* name;
};

struct Binary {
  const void* data;
  std::vector<Kernel> kernels;
  void** registered = nullptr;  // the runtime's handle
};

struct Runtime {
  std::mutex mutex;
  std::vector<Binary*> binaries;
  void* library = nullptr;
  bool tried = false;
};

Runtime& runtime() {
  static Runtime* r = new Runtime;  // outlives static destructors that unregister
  return *r;
}

using RegisterBinary = void** (*)(const void*);
using RegisterKernel = void (*)(void**, const void*, char*, const char*, unsigned, void*, void*, void*, void*, int*);

void hand_over(Runtime& r, Binary& b) {
  const auto binary = reinterpret_cast<RegisterBinary>(dlsym(r.library, "__hipRegisterFatBinary"));
  const auto kernel = reinterpret_cast<RegisterKernel>(dlsym(r.library, "__hipRegisterFunction"));
  if (binary == nullptr || kernel == nullptr) return;
  b.registered = binary(b.data);
  for (const Kernel& k : b.kernels) {
    kernel(b.registered, k.host, const_cast<char*>(k.name), k.name, ~0u, nullptr, nullptr, nullptr, nullptr, nullptr);
  }
}

void* find(const char* name) {
  Runtime& r = runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  if (!r.tried) {
    r.tried = true;
    for (const char* file : {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so",
                             "/opt/rocm/lib/libamdhip64.so"}) {
      r.library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
      if (r.library != nullptr) break;
    }
    if (r.library != nullptr) {
      for (Binary* b : r.binaries) hand_over(r, *b);
    }
  }
  return r.library != nullptr ? dlsym(r.library, name) : nullptr;
}

}  // namespace

#define PASS_ON(result, absent, name, parameters, arguments)                            \
  extern "C" result name parameters {                                                   \
    static const auto pass_on_to = reinterpret_cast<result(*) parameters>(find(#name)); \
    if (pass_on_to == nullptr) return absent;                                           \
    return pass_on_to arguments;                                                        \
  }
#define PASS_STATUS(name, parameters, arguments) PASS_ON(hipError_t, hipErrorNoDevice, name, parameters, arguments)

PASS_ON(const char*, "no HIP runtime", hipGetErrorName, (hipError_t e), (e))
PASS_ON(const char*, "libamdhip64 not found", hipGetErrorString, (hipError_t e), (e))
PASS_ON(hipError_t, hipSuccess, hipGetLastError, (), ())
PASS_STATUS(hipGetDeviceCount, (int* n), (n))
PASS_STATUS(hipSetDevice, (int d), (d))
PASS_STATUS(hipDeviceGetName, (char* name, int n, hipDevice_t d), (name, n, d))
PASS_STATUS(hipDeviceGetAttribute, (int* v, hipDeviceAttribute_t a, int d), (v, a, d))
PASS_STATUS(hipDeviceSynchronize, (), ())
PASS_STATUS(hipMalloc, (void** p, size_t n), (p, n))
PASS_STATUS(hipFree, (void* p), (p))
PASS_STATUS(hipMemGetInfo, (size_t* free, size_t* total), (free, total))
PASS_STATUS(hipHostMalloc, (void** p, size_t n, unsigned flags), (p, n, flags))
PASS_STATUS(hipHostFree, (void* p), (p))
PASS_STATUS(hipMemcpyAsync, (void* d, const void* s, size_t n, hipMemcpyKind k, hipStream_t q), (d, s, n, k, q))
PASS_STATUS(hipMemsetAsync, (void* d, int v, size_t n, hipStream_t q), (d, v, n, q))
PASS_STATUS(hipStreamCreateWithFlags, (hipStream_t * q, unsigned flags), (q, flags))
PASS_STATUS(hipStreamSynchronize, (hipStream_t q), (q))
PASS_STATUS(hipStreamDestroy, (hipStream_t q), (q))
PASS_STATUS(hipStreamBeginCapture, (hipStream_t q, hipStreamCaptureMode m), (q, m))
PASS_STATUS(hipStreamEndCapture, (hipStream_t q, hipGraph_t* g), (q, g))
PASS_STATUS(hipGraphInstantiate, (hipGraphExec_t * e, hipGraph_t g, hipGraphNode_t* n, char* log, size_t bytes),
            (e, g, n, log, bytes))
PASS_STATUS(hipGraphDestroy, (hipGraph_t g), (g))
PASS_STATUS(hipGraphLaunch, (hipGraphExec_t e, hipStream_t q), (e, q))
PASS_STATUS(hipGraphExecDestroy, (hipGraphExec_t e), (e))
PASS_STATUS(hipEventCreateWithFlags, (hipEvent_t * e, unsigned flags), (e, flags))
PASS_STATUS(hipEventRecord, (hipEvent_t e, hipStream_t q), (e, q))
PASS_STATUS(hipEventSynchronize, (hipEvent_t e), (e))
PASS_STATUS(hipEventElapsedTime, (float* ms, hipEvent_t a, hipEvent_t b), (ms, a, b))
PASS_STATUS(hipEventDestroy, (hipEvent_t e), (e))
PASS_STATUS(hipFuncGetAttributes, (hipFuncAttributes * a, const void* f), (a, f))
PASS_STATUS(hipLaunchKernel, (const void* f, dim3 grid, dim3 block, void** args, size_t lds, hipStream_t q),
            (f, grid, block, args, lds, q))
PASS_STATUS(__hipPushCallConfiguration, (dim3 grid, dim3 block, size_t lds, hipStream_t q), (grid, block, lds, q))
PASS_STATUS(__hipPopCallConfiguration, (dim3 * grid, dim3* block, size_t* lds, hipStream_t* q), (grid, block, lds, q))

extern "C" void** __hipRegisterFatBinary(const void* data) {
  Runtime& r = runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.binaries.push_back(new Binary{data, {}, nullptr});
  return reinterpret_cast<void**>(r.binaries.back());
}

extern "C" void __hipRegisterFunction(void** binary, const void* host, char* device_name, const char*, unsigned, void*,
                                      void*, void*, void*, int*) {
  reinterpret_cast<Binary*>(binary)->kernels.push_back({host, device_name});
}

extern "C" void __hipUnregisterFatBinary(void** binary) {
  Runtime& r = runtime();
  Binary* b = reinterpret_cast<Binary*>(binary);
  if (b->registered == nullptr) return;
  using Unregister = void (*)(void**);
  const auto f = reinterpret_cast<Unregister>(dlsym(r.library, "__hipUnregisterFatBinary"));
  if (f != nullptr) f(b->registered);
  b->registered = nullptr;
}
