// A tensor read from a file arrives as the same device bytes as one handed over in memory, and the file does not stay
// in the page cache.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "../cpp/page_cache.h"
#include "core/file_reader.h"
#include "engine_tests.h"
#include "reference.h"

namespace dflash::test {

namespace {

// Quants [expert, tile, group, chunk, row 32, 16 bytes], then scales [expert, tile, group, row 32, bytes]: kernels copy
// whole tiles, so the rows behind n_out are set too.
void expect_empty_padding(const HostTensor& t, const std::vector<uint8_t>& device) {
  const size_t tiles = static_cast<size_t>((t.n_out + 31) / 32), groups = static_cast<size_t>(t.n_in / 32);
  const size_t chunks = t.type == DType::Q8_0 ? 2 : 1, scale = t.type == DType::Q4_1 ? 4 : 2;
  const size_t blocks = static_cast<size_t>(t.n_expert) * tiles * groups;
  for (size_t block = 0; block < blocks; ++block) {
    const size_t tile = block / groups % tiles;
    for (size_t r = static_cast<size_t>(t.n_out) - std::min(static_cast<size_t>(t.n_out), tile * 32); r < 32; ++r) {
      bool empty = true;
      for (size_t c = 0; c < chunks; ++c) {
        const uint8_t* quants = &device[((block * chunks + c) * 32 + r) * 16];
        empty = empty && std::all_of(quants, quants + 16, [](uint8_t b) { return b == 0; });
      }
      const uint8_t* scales = &device[blocks * chunks * 32 * 16 + (block * 32 + r) * scale];
      empty = empty && std::all_of(scales, scales + scale, [](uint8_t b) { return b == 0; });
      expect(empty, cat("loading ", dtype_info(t.type).name, ": row ", r, " of tile ", tile, " is padding and not 0"));
    }
  }
}

}  // namespace

void test_loading(Backend& gpu, bool quick) {
  std::mt19937 rng(21);
  const std::string path = cat("/tmp/gpu_test_loading.", ::getpid());
  // Odd shapes, then one stack large enough for several chunks and a rate.
  struct Item {
    std::shared_ptr<TestTensor> t;
    uint64_t offset;
  };
  std::vector<Item> items;
  for (DType type : {DType::F32, DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::BF16}) {
    items.push_back({random_tensor(rng, type, 224, 77, 3), 0});
    items.push_back({random_tensor(rng, type, 3072, 1, 1), 0});
  }
  items.push_back({random_tensor(rng, DType::F32, 3072, 4096, 1), 0});
  TestTensor large;
  large.host = items[2].t->host;
  large.host.n_in = 3072;
  large.host.n_out = 1536;
  large.host.n_expert = quick ? 48 : 384;
  large.bytes.resize(row_bytes(DType::Q4_0, 3072) * 1536 * static_cast<size_t>(large.host.n_expert));
  for (size_t i = 0; i + 8 <= large.bytes.size(); i += 8) {
    const uint64_t bits = static_cast<uint64_t>(rng()) << 32 | rng();
    std::memcpy(&large.bytes[i], &bits, 8);
  }
  large.host.data = large.bytes.data();
  large.host.bytes = large.bytes.size();
  items.push_back({std::make_shared<TestTensor>(std::move(large)), 0});
  items.back().t->host.data = items.back().t->bytes.data();

  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
  uint64_t end = 96;  // tensors begin at multiples of 32, as in GGUF
  for (Item& item : items) {
    item.offset = end;
    for (size_t done = 0; done < item.t->bytes.size();) {
      const ssize_t n =
          ::pwrite(fd, item.t->bytes.data() + done, item.t->bytes.size() - done, static_cast<off_t>(end + done));
      if (n <= 0) fail(path, ": cannot write");
      done += static_cast<size_t>(n);
    }
    end = (end + item.t->bytes.size() + 31) / 32 * 32;
  }
  (void)::fsync(fd);
  (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  ::close(fd);

  const double cached_before = cached_share(path, end - 32);
  for (const Item& item : items) {
    HostTensor in_file = item.t->host;
    in_file.path = path;
    in_file.file_offset = item.offset;
    in_file.data = nullptr;
    const auto start = std::chrono::steady_clock::now();
    const Weight a = gpu.load(in_file, nullptr);
    uint8_t byte = 0;
    gpu.download(&byte, a.data, 1);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (item.t->bytes.size() > (size_t{100} << 20)) {
      std::printf("%.2f GB from the file: %.2f GB/s\n", item.t->bytes.size() * 1e-9,
                  item.t->bytes.size() * 1e-9 / seconds);
    }
    HostTensor in_memory = item.t->host;
    const Weight b = gpu.load(in_memory, nullptr);
    const size_t bytes = gpu.weight_bytes(in_memory);
    std::vector<uint8_t> x(bytes), y(bytes);
    gpu.download(x.data(), a.data, bytes);
    gpu.download(y.data(), b.data, bytes);
    expect(x == y, cat("loading ", dtype_info(in_memory.type).name, ": bytes differ"));
    if (is_quantized(in_memory.type)) expect_empty_padding(in_memory, x);
    if (!is_quantized(in_memory.type)) {
      expect(std::memcmp(x.data(), item.t->bytes.data(), bytes) == 0, "loading: not the file's bytes");
    }
    if (item.t->values.empty()) continue;
    // Through an op: row i of the table is row i of the tensor.
    std::vector<int32_t> ids(static_cast<size_t>(in_memory.n_out));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    if (in_memory.n_expert > 1 || ids.size() > 4096) continue;
    Buffer device_ids = gpu.alloc(ids.size() * 4);
    gpu.upload(device_ids.data, ids.data(), ids.size() * 4);
    Guarded out(gpu, ids.size() * static_cast<size_t>(in_memory.n_in));
    gpu.embed(a, device_ids.as<int32_t>(), static_cast<int>(ids.size()), out.data());
    double error = 0.0;
    const Floats got = out.get("embed");
    for (size_t i = 0; i < got.size(); ++i)
      error = std::max(error, std::fabs(static_cast<double>(got[i]) - item.t->values[i]));
    expect(error < 1e-7, cat("loading ", dtype_info(in_memory.type).name, ": values differ by ", error));
  }
  gpu.loaded();
  const double cached_after = cached_share(path, end - 32);
  std::printf("file pages in the page cache: %.3f before, %.3f after loading; direct reads: %s\n", cached_before,
              cached_after, FileReader(path).direct() ? "yes" : "no");
  expect(cached_before > 0.05 || cached_after < 0.05, "loading fills the page cache");
  ::unlink(path.c_str());

  // A need that does not fit is refused by name and figures, and what is there goes on working.
  bool thrown = false;
  try {
    (void)gpu.alloc(gpu.memory().total * 2);
  } catch (const CapacityError& e) {
    thrown = true;
    std::printf("out of memory: %s\n", e.what());
  }
  expect(thrown, "twice the device's memory was allocated");
  Guarded g(gpu, random_floats(rng, 100));
  (void)g.get("after out of memory");
}

// Last, because the device is gone afterwards.
void test_lost_device(Backend& gpu, Backend& cpu) {
  const auto error_of = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  Buffer buffer = gpu.alloc(4096);
  std::vector<float> host(1024, 1.0f);
  gpu.upload(buffer.data, host.data(), 4096);
  const float* nowhere = reinterpret_cast<const float*>(uintptr_t{64} << 40);
  // The fault is asynchronous: it shows in this call or in one of the next.
  const std::string first = error_of([&] {
    gpu.rms_norm(nowhere, buffer.as<float>(), 1e-6f, 1, 1024, buffer.as<float>());
    gpu.download(host.data(), buffer.data, 4096);
  });
  std::printf("lost device: %s\n", first.c_str());
  expect(first.find("the device was lost") != std::string::npos, "a fault does not mark the device lost");
  int32_t token = 0;
  Top1 top;
  expect(error_of([&] { (void)gpu.alloc(64); }) == first, "alloc after the loss");
  expect(error_of([&] { gpu.upload(buffer.data, host.data(), 64); }) == first, "upload after the loss");
  expect(error_of([&] { gpu.download(host.data(), buffer.data, 64); }) == first, "download after the loss");
  expect(error_of([&] { gpu.copy_rows(buffer.as<float>(), 1, 8, buffer.as<float>(), 8); }) == first,
         "an op after the loss");
  expect(error_of([&] { gpu.top1(buffer.as<float>(), 1, 100, &top); }) == first, "top1 after the loss");
  expect(error_of([&] { (void)gpu.memory(); }) == first, "memory() after the loss");
  Sampling s;
  s.temperature = 1.0f;
  s.draws = {0};
  expect(error_of([&] { gpu.sample(s, buffer.as<float>(), 100, &token); }) == first, "sample after the loss");
  // The CPU backend is not concerned.
  std::vector<float> row(100, 0.0f);
  row[42] = 5.0f;
  cpu.top1(row.data(), 1, 100, &top);
  expect(top.id == 42, "the CPU backend after the loss");
}

}  // namespace dflash::test
