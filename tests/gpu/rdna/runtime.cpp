// A HIP runtime with one gfx1151 device that interprets its instructions. It is built as libamdhip64 into a folder of
// its own, and the loader finds it where that folder is in the library path. Streams run what they are given at once.
//
// A file `options` beside the library may hold lines "name value": reverse_waves, reverse_groups, check_waits,
// check_alignment, check_races, threads (see Options), counts FILE (the table of what was executed, written at the
// end), profile FOLDER (a file a kernel). rdna_set() does the same from a program.

#include <dlfcn.h>
#include <hip/hip_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>

#include "code_object.h"
#include "decode.h"
#include "interpreter.h"

struct ihipStream_t {
  bool capturing = false;
  std::vector<std::function<hipError_t()>> captured;
};
struct ihipGraph {
  std::vector<std::function<hipError_t()>> nodes;
};
struct hipGraphExec {
  std::vector<std::function<hipError_t()>> nodes;
};

namespace {

using namespace rdna;

constexpr size_t kGuard = 1 << 16;  // around an allocation, so that accesses beyond it meet no other
constexpr size_t kTotal = size_t{1} << 34;

struct Device {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<CodeObject>> objects;
  std::map<const void*, std::pair<CodeObject*, Kernel*>> kernels;  // by the host's stub
  std::map<uint64_t, uint64_t> allocations;                        // begin -> bytes
  std::vector<Region> memory;                                      // sorted; rebuilt when empty
  size_t used = 0;
  Operations operations;
  Interpreter interpreter;
  Options options;
  std::string counts, profiles;
  std::string last_fault;
  hipError_t error = hipSuccess;  // of a kernel; from then on every call's
  struct {
    dim3 grid, block;
    size_t lds;
    hipStream_t stream;
  } call;  // between pushing and popping a call's configuration

  Device() {
    Dl_info info;
    if (dladdr(reinterpret_cast<const void*>(&hipGetErrorName), &info) == 0) return;
    const std::string path = info.dli_fname;
    std::ifstream file(path.substr(0, path.find_last_of('/') + 1) + "options");
    for (std::string name, value; file >> name >> value;) set(name, value);
  }

  bool set(const std::string& name, const std::string& value) {
    const auto flag = [&] { return value != "0"; };
    if (name == "reverse_waves") {
      options.reverse_waves = flag();
    } else if (name == "reverse_groups") {
      options.reverse_groups = flag();
    } else if (name == "check_waits") {
      options.check_waits = flag();
    } else if (name == "check_alignment") {
      options.check_alignment = flag();
    } else if (name == "check_races") {
      options.check_races = flag();
    } else if (name == "threads") {
      options.threads = std::stoi(value);
    } else if (name == "counts") {
      counts = value;
    } else if (name == "profile") {
      profiles = value;
    } else {
      std::fprintf(stderr, "rdna: no option '%s'\n", name.c_str());
      return false;
    }
    return true;
  }

  std::vector<const Kernel*> all() const {
    std::vector<const Kernel*> r;
    for (const auto& o : objects) {
      for (const auto& k : o->kernels()) r.push_back(k.get());
    }
    return r;
  }

  void report() const {
    if (!counts.empty()) std::ofstream(counts) << counts_table(all());
    if (profiles.empty()) return;
    int number = 0;
    for (const Kernel* k : all()) {
      if (k->launches > 0) std::ofstream(profiles + "/" + std::to_string(number++) + ".txt") << profile(*k);
    }
  }

  hipError_t allocate(void** p, size_t bytes) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (error != hipSuccess) return error;
    if (bytes > kTotal - used) return hipErrorOutOfMemory;
    const size_t whole = (bytes + 2 * kGuard + 4095) / 4096 * 4096;
    auto* base = static_cast<uint8_t*>(std::aligned_alloc(4096, whole));
    if (base == nullptr) return hipErrorOutOfMemory;
    uint8_t* data = base + kGuard;
    for (size_t i = 0; i + 4 <= bytes; i += 4) std::memcpy(data + i, &kPoison, 4);
    allocations[reinterpret_cast<uint64_t>(data)] = bytes;
    memory.clear();
    used += bytes;
    *p = data;
    return hipSuccess;
  }

  hipError_t free(void* p) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (p == nullptr) return hipSuccess;
    const auto a = allocations.find(reinterpret_cast<uint64_t>(p));
    if (a == allocations.end()) return hipErrorInvalidValue;
    used -= a->second;
    std::free(static_cast<uint8_t*>(p) - kGuard);
    allocations.erase(a);
    memory.clear();
    return hipSuccess;
  }

  // Runs or records, by the stream's state.
  hipError_t submit(hipStream_t stream, std::function<hipError_t()> f) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (stream != nullptr && stream->capturing) {
      stream->captured.push_back(std::move(f));
      return hipSuccess;
    }
    return error != hipSuccess ? error : f();
  }

  hipError_t run(const Launch& launch, CodeObject* object) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    try {
      if (launch.kernel->code.empty()) {
        launch.kernel->code = decode(object->disassemble(*launch.kernel), operations);
      }
      if (memory.empty()) {
        for (const auto& o : objects) memory.push_back(o->region());
        for (const auto& [begin, bytes] : allocations) memory.push_back({begin, begin + bytes, true});
      }
      std::vector<Region> regions = memory;
      const auto arguments = reinterpret_cast<uint64_t>(launch.arguments.data());
      regions.push_back({arguments, arguments + launch.arguments.size(), false});
      std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
      interpreter.run(launch, regions, options);
      return hipSuccess;
    } catch (const Fault& f) {
      last_fault = readable_name(launch.kernel->name) + ": " + f.what();
      std::fprintf(stderr, "rdna: %s\n", last_fault.c_str());
      return error = hipErrorLaunchFailure;
    }
  }
};

Device& device() {
  static Device* d = [] {
    auto* made = new Device;
    std::atexit([] { device().report(); });
    return made;
  }();
  return *d;
}

void fill_arguments(Launch& launch, void** args) {
  const Kernel& k = *launch.kernel;
  launch.arguments.assign(std::max<size_t>(k.argument_bytes, 8), 0);
  size_t next = 0;
  for (const Kernel::Argument& a : k.arguments) {
    uint8_t* to = launch.arguments.data() + a.offset;
    const auto number = [&](uint64_t v) { std::memcpy(to, &v, a.size); };
    if (a.kind.rfind("hidden_", 0) != 0) {
      std::memcpy(to, args[next++], a.size);
      continue;
    }
    for (int d = 0; d < 3; d++) {
      const std::string axis = std::string("_") + "xyz"[d];
      if (a.kind == "hidden_block_count" + axis) number(launch.grid[d]);
      if (a.kind == "hidden_group_size" + axis) number(launch.block[d]);
    }
    if (a.kind == "hidden_grid_dims") number(launch.grid[2] > 1 ? 3 : launch.grid[1] > 1 ? 2 : 1);
    if (a.kind == "hidden_dynamic_lds_size") number(launch.dynamic_lds);
  }
}

}  // namespace

extern "C" {

// The test's hand on it.
int rdna_set(const char* name, const char* value) { return device().set(name, value) ? 0 : 1; }
// What the last kernel that failed did; "" when none failed. Clears it, so that the device works again.
const char* rdna_take_fault() {
  Device& d = device();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  static std::string text;
  text = d.last_fault;
  d.last_fault.clear();
  d.error = hipSuccess;
  return text.c_str();
}

// What was executed since the last clearing, to a file.
void rdna_write_counts(const char* path) {
  Device& d = device();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  std::ofstream(path) << counts_table(d.all());
}
void rdna_clear_counts() {
  Device& d = device();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  for (const auto& o : d.objects) {
    for (const auto& k : o->kernels()) {
      k->launches = 0;
      for (auto* counts : {&k->times, &k->lanes, &k->misaligned}) std::fill(counts->begin(), counts->end(), 0);
    }
  }
}

const char* hipGetErrorName(hipError_t e) { return e == hipErrorLaunchFailure ? "hipErrorLaunchFailure" : "hipError"; }
const char* hipGetErrorString(hipError_t e) {
  return e == hipErrorLaunchFailure && !device().last_fault.empty() ? device().last_fault.c_str()
                                                                    : "said by the interpreter of gfx1151";
}
hipError_t hipGetLastError() { return device().error; }
hipError_t hipGetDeviceCount(int* n) {
  *n = 1;
  return hipSuccess;
}
hipError_t hipSetDevice(int) { return device().error; }
hipError_t hipDeviceGetName(char* name, int n, hipDevice_t) {
  std::snprintf(name, static_cast<size_t>(n), "gfx1151 interpreted");
  return hipSuccess;
}
hipError_t hipDeviceGetAttribute(int* v, hipDeviceAttribute_t a, int) {
  *v = a == hipDeviceAttributeComputeCapabilityMajor   ? 11
       : a == hipDeviceAttributeComputeCapabilityMinor ? 5
       : a == hipDeviceAttributeMultiprocessorCount    ? 20  // HIP counts work group processors
       : a == hipDeviceAttributeIntegrated             ? 1
                                                       : 0;
  return hipSuccess;
}
hipError_t hipDeviceSynchronize() { return device().error; }
hipError_t hipMalloc(void** p, size_t n) { return device().allocate(p, n); }
hipError_t hipFree(void* p) { return device().free(p); }
hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  *free = kTotal - device().used;
  *total = kTotal;
  return device().error;
}
hipError_t hipHostMalloc(void** p, size_t n, unsigned) { return device().allocate(p, n); }
hipError_t hipHostFree(void* p) { return device().free(p); }
hipError_t hipMemcpyAsync(void* d, const void* s, size_t n, hipMemcpyKind, hipStream_t q) {
  return device().submit(q, [=] {
    std::memmove(d, s, n);
    return hipSuccess;
  });
}
hipError_t hipMemsetAsync(void* d, int v, size_t n, hipStream_t q) {
  return device().submit(q, [=] {
    std::memset(d, v, n);
    return hipSuccess;
  });
}
hipError_t hipStreamCreateWithFlags(hipStream_t* s, unsigned) {
  *s = new ihipStream_t;
  return hipSuccess;
}
hipError_t hipStreamSynchronize(hipStream_t) { return device().error; }
hipError_t hipStreamDestroy(hipStream_t s) {
  delete s;
  return hipSuccess;
}
hipError_t hipStreamBeginCapture(hipStream_t s, hipStreamCaptureMode) {
  s->capturing = true;
  s->captured.clear();
  return device().error;
}
hipError_t hipStreamEndCapture(hipStream_t s, hipGraph_t* g) {
  s->capturing = false;
  *g = new ihipGraph{std::move(s->captured)};
  return hipSuccess;
}
hipError_t hipGraphInstantiate(hipGraphExec_t* e, hipGraph_t g, hipGraphNode_t*, char*, size_t) {
  *e = new hipGraphExec{g->nodes};
  return hipSuccess;
}
hipError_t hipGraphDestroy(hipGraph_t g) {
  delete g;
  return hipSuccess;
}
hipError_t hipGraphLaunch(hipGraphExec_t e, hipStream_t) {
  for (const auto& node : e->nodes) {
    const hipError_t status = device().submit(nullptr, node);
    if (status != hipSuccess) return status;
  }
  return hipSuccess;
}
hipError_t hipGraphExecDestroy(hipGraphExec_t e) {
  delete e;
  return hipSuccess;
}
hipError_t hipEventCreateWithFlags(hipEvent_t* e, unsigned) {
  *e = reinterpret_cast<hipEvent_t>(&device());
  return hipSuccess;
}
hipError_t hipEventRecord(hipEvent_t, hipStream_t) { return device().error; }
hipError_t hipEventSynchronize(hipEvent_t) { return device().error; }
hipError_t hipEventElapsedTime(float* ms, hipEvent_t, hipEvent_t) {
  *ms = 0;  // nothing is timed
  return hipSuccess;
}
hipError_t hipEventDestroy(hipEvent_t) { return hipSuccess; }
hipError_t hipFuncGetAttributes(hipFuncAttributes* a, const void* f) {
  Device& d = device();
  const auto k = d.kernels.find(f);
  if (k == d.kernels.end()) return hipErrorInvalidDeviceFunction;
  *a = hipFuncAttributes();
  a->numRegs = static_cast<int>(k->second.second->vgprs);
  a->sharedSizeBytes = k->second.second->lds;
  a->maxThreadsPerBlock = static_cast<int>(k->second.second->max_threads);
  return hipSuccess;
}
hipError_t hipLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t lds, hipStream_t q) {
  Device& d = device();
  const auto k = d.kernels.find(f);
  if (k == d.kernels.end()) return hipErrorInvalidDeviceFunction;
  if (static_cast<uint64_t>(grid.x) * grid.y * grid.z == 0 || static_cast<uint64_t>(block.x) * block.y * block.z == 0)
    return hipErrorInvalidConfiguration;
  Launch launch{
      k->second.second, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<uint32_t>(lds), {}};
  fill_arguments(launch, args);
  return d.submit(q, [&d, launch, object = k->second.first] { return d.run(launch, object); });
}
hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t lds, hipStream_t stream) {
  Device& d = device();
  d.mutex.lock();  // until popped
  d.call = {grid, block, lds, stream};
  return hipSuccess;
}
hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* lds, hipStream_t* stream) {
  Device& d = device();
  *grid = d.call.grid;
  *block = d.call.block;
  *lds = d.call.lds;
  *stream = d.call.stream;
  d.mutex.unlock();
  return hipSuccess;
}
void** __hipRegisterFatBinary(const void* wrapper) {
  Device& d = device();
  try {
    d.objects.push_back(open_bundle(wrapper, "gfx1151"));
  } catch (const Fault& f) {
    std::fprintf(stderr, "rdna: %s\n", f.what());
    d.objects.push_back(nullptr);
  }
  if (d.objects.back() == nullptr) {
    d.objects.pop_back();
    return nullptr;
  }
  return reinterpret_cast<void**>(d.objects.back().get());
}
void __hipRegisterFunction(void** binary, const void* host, char*, const char* name, unsigned, void*, void*, void*,
                           void*, int*) {
  auto* object = reinterpret_cast<CodeObject*>(binary);
  if (object == nullptr) return;
  for (auto& k : object->kernels()) {
    if (k->name == name) device().kernels[host] = {object, k.get()};
  }
}
void __hipUnregisterFatBinary(void**) {}

}  // extern "C"
