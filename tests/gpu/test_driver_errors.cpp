// What a driver may answer, each said once and clearly, with the process going on. Needs no GPU: the runtime is
// fake_hip.cpp, or absent.
//
//   gpu_test_driver_errors missing     no libamdhip64 can be found
//   gpu_test_driver_errors fake        the fake one lies in the library path

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "backend/hip/hip_backend.h"

using namespace dflash;

namespace {

bool has(const std::string& text, const char* part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) std::printf("'%s' is not in: %s\n", part, text.c_str());
  return found;
}

template <typename F>
std::string error_of(F call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

void test_missing() {
  const std::string why = hip_backend_status();
  CHECK(has(why, "no usable GPU driver") && has(why, "libamdhip64 not found"));
  CHECK(hip_backend_status() == why);
  CHECK(has(error_of([] { (void)make_hip_backend(BackendOptions()); }), why.c_str()));
}

void test_fake() {
  void* library = dlopen("libamdhip64.so.7", RTLD_NOW);
  if (library == nullptr) fail("the fake runtime is not in the library path: ", dlerror());
  const auto set = reinterpret_cast<void (*)(const char*, long)>(dlsym(library, "fake_hip_set"));
  if (set == nullptr) fail("libamdhip64.so.7 is not the fake one");

  set("devices", 0);
  CHECK(has(hip_backend_status(), "no usable GPU driver"));
  set("devices", 1);

  // A device of another architecture, by its number and by what the runtime says of the kernels.
  set("major", 10);
  set("minor", 3);
  const std::string other = hip_backend_status();
  CHECK(has(other, "no kernels for the GPU here: they are for gfx1151, and it is gfx10.3"));
  CHECK(has(error_of([] { (void)make_hip_backend(BackendOptions()); }), other.c_str()));
  set("major", 11);
  set("minor", 5);
  set("kernels_there", 98);  // hipErrorInvalidDeviceFunction
  CHECK(has(hip_backend_status(), "no kernels for the GPU here: hipErrorFake"));
  set("kernels_there", 0);
  CHECK(hip_backend_status().empty());

  const auto backend = make_hip_backend(BackendOptions());
  CHECK(has(backend->describe(), "fake device"));
  std::vector<float> host(256, 1.0f);
  const Buffer buffer = backend->alloc(1024);
  backend->upload(buffer.data, host.data(), 1024);

  // Out of memory: figures, and what is there goes on working.
  std::string text;
  try {
    (void)backend->alloc(size_t{3} << 30);
  } catch (const CapacityError& e) {
    text = e.what();
  }
  CHECK(has(text, "3.00 GiB asked for") && has(text, "1.00 GiB free of 2.00 GiB") && has(text, "short by 2.00 GiB"));
  backend->download(host.data(), buffer.data, 1024);
  CHECK(host[255] == 1.0f);

  // An error that is none of the device's end: this call fails, the next works.
  set("next_sync", 1);  // hipErrorInvalidValue
  text = error_of([&] { backend->download(host.data(), buffer.data, 4); });
  CHECK(has(text, "failed: hipErrorFake"));
  CHECK(error_of([&] { backend->download(host.data(), buffer.data, 4); }).empty());

  // A fault shows at a wait; from then on every call says the same, though this runtime itself has forgotten it.
  set("next_sync", 700);
  const std::string lost = error_of([&] { backend->download(host.data(), buffer.data, 4); });
  CHECK(has(lost, "the device was lost") && has(lost, "backend='cpu' goes on working"));
  CHECK(error_of([&] { backend->download(host.data(), buffer.data, 4); }) == lost);
  CHECK(error_of([&] { backend->upload(buffer.data, host.data(), 4); }) == lost);
  CHECK(error_of([&] { (void)backend->alloc(64); }) == lost);
  CHECK(error_of([&] { (void)backend->memory(); }) == lost);
  CHECK(error_of([&] { backend->copy_rows(buffer.as<float>(), 1, 4, buffer.as<float>(), 4); }) == lost);
  CHECK(hip_backend_status() == lost);
  CHECK(has(error_of([] { (void)make_hip_backend(BackendOptions()); }), lost.c_str()));
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "missing") {
    test_missing();
  } else if (what == "fake") {
    test_fake();
  } else {
    fail("missing or fake expected, found '", what, "'");
  }
  return test::report(("test_driver_errors " + what).c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_driver_errors: %s\n", e.what());
  return 2;
}
