// What happens before and while weights are read: the file reader, the memory need, the architecture of a build.

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backend/hip/architecture.h"
#include "check.h"
#include "core/file_reader.h"
#include "core/units.h"
#include "engine/memory_need.h"
#include "page_cache.h"

using namespace dflash;

namespace {

struct TempFile {
  std::string path;
  std::vector<char> bytes;

  explicit TempFile(size_t size) : path(cat("/var/tmp/dflash_test_loading.", ::getpid(), ".", size)), bytes(size) {
    std::mt19937 random(static_cast<unsigned>(size));
    for (char& b : bytes) b = static_cast<char>(random());
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    for (size_t done = 0; done < size;) {
      const ssize_t n = ::write(fd, bytes.data() + done, size - done);
      if (n <= 0) fail(path, ": cannot write");
      done += static_cast<size_t>(n);
    }
    (void)::fsync(fd);
    (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
  ~TempFile() { ::unlink(path.c_str()); }
};

struct Aligned {
  explicit Aligned(size_t bytes)
      : data(std::aligned_alloc(FileReader::kAlign, FileReader::buffer_bytes(bytes)), &std::free) {}
  std::unique_ptr<void, decltype(&std::free)> data;
};

void test_reader() {
  for (const size_t size : {size_t{1}, size_t{4095}, size_t{4096}, size_t{4097}, size_t{100003}}) {
    const TempFile file(size);
    for (const bool direct : {true, false}) {
      FileReader reader(file.path, direct);
      CHECK(reader.size() == size && (direct || !reader.direct()));
      std::mt19937 random(7);
      for (int i = 0; i < 200; ++i) {
        const size_t at = i == 0 ? 0 : i == 1 ? size : random() % (size + 1);
        const size_t n = i < 2 ? size - at : random() % (size - at + 1);
        const Aligned buffer(n);
        const char* got = reader.read(at, n, buffer.data.get());
        const char* begin = static_cast<const char*>(buffer.data.get());
        CHECK(got >= begin && got + n <= begin + FileReader::buffer_bytes(n));
        CHECK(std::memcmp(got, file.bytes.data() + at, n) == 0);
      }
      const Aligned buffer(size + 100);
      CHECK_THROWS(reader.read(1, size, buffer.data.get()), "but the file has");
      CHECK_THROWS(reader.read(size + 1, 0, buffer.data.get()), "but the file has");
      CHECK_THROWS(reader.read(~uint64_t{0} - 4, 8, buffer.data.get()), "but the file has");
      // Cut while it is open: what is gone is said, not zeros read.
      if (::truncate(file.path.c_str(), static_cast<off_t>(size / 2)) != 0) fail("truncate");
      CHECK_THROWS(reader.read(0, size, buffer.data.get()), "was it cut meanwhile?");
      const int fd = ::open(file.path.c_str(), O_WRONLY | O_TRUNC);
      CHECK(::pwrite(fd, file.bytes.data(), size, 0) == static_cast<ssize_t>(size));
      ::close(fd);
    }
  }
  CHECK_THROWS(FileReader("/nonexistent/file"), "/nonexistent/file: cannot open: No such file");
  CHECK_THROWS(FileReader("/tmp"), "/tmp: ");
}

// Neither way leaves the file in the page cache (looked at only where the system tells the truth about it).
void test_page_cache() {
  const TempFile file(size_t{8} << 20);
  const Aligned buffer(file.bytes.size());
  const double before = test::cached_share(file.path, file.bytes.size());
  for (const bool direct : {true, false}) {
    FileReader reader(file.path, direct);
    for (size_t at = 0; at < file.bytes.size(); at += size_t{1} << 20)
      (void)reader.read(at, size_t{1} << 20, buffer.data.get());
    const double after = test::cached_share(file.path, file.bytes.size());
    if (before == 0.0) CHECK(after < 0.1);
  }
  // The control: an ordinary read does fill it.
  const int fd = ::open(file.path.c_str(), O_RDONLY);
  CHECK(::pread(fd, buffer.data.get(), file.bytes.size(), 0) == static_cast<ssize_t>(file.bytes.size()));
  ::close(fd);
  if (before == 0.0) CHECK(test::cached_share(file.path, file.bytes.size()) > 0.9);
  std::printf("page cache: %s\n", before == 0.0 ? "checked" : "not visible here");
}

constexpr size_t kGiB = size_t{1} << 30;

MemoryNeed example() {
  MemoryNeed n;
  n.parts = {{"target weights", 100 * kGiB}, {"cache of 32768 tokens (F16)", 8 * kGiB}, {"working memory", kGiB}};
  n.n_ctx = 32768;
  n.cache = 8 * kGiB;
  n.cache_q8_0 = 8 * kGiB * 34 / 64;
  n.head = 2 * kGiB;
  n.head_q4_0 = kGiB / 2;
  return n;
}

void test_memory_problem() {
  const auto with_free = [](const MemoryNeed& n, double gib) {
    return memory_problem(n, {128 * kGiB, static_cast<size_t>(gib * static_cast<double>(kGiB)), "a hint"}, "gpu");
  };
  const auto has = [](const std::string& text, const char* part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) std::printf("'%s' is not in: %s\n", part, text.c_str());
    return found;
  };
  const MemoryNeed need = example();
  CHECK(need.total() == 109 * kGiB);
  CHECK(with_free(need, 109).empty());
  std::string text = with_free(need, 107);
  CHECK(has(text, "109.00 GiB needed on gpu, 107.00 GiB free of 128.00 GiB: 2.00 GiB short"));
  CHECK(has(text, "target weights 100.00 GiB, cache of 32768 tokens (F16) 8.00 GiB, working memory 1.00 GiB"));
  CHECK(has(text, "n_ctx=24576;"));  // 6 of 8 GiB
  CHECK(has(text, "kv_type='q8_0' (saves 3.75 GiB, enough)"));
  CHECK(has(text, "a Q4_0 head (saves 1.50 GiB); a hint."));
  // What is advised is enough.
  MemoryNeed smaller = need;
  smaller.parts[1].bytes = 6 * kGiB;
  CHECK(with_free(smaller, 107).empty());

  text = with_free(need, 103);  // 2 GiB for a cache of 4.25
  CHECK(has(text, "n_ctx=8192;") && has(text, "kv_type='q8_0' (saves 3.75 GiB, enough with n_ctx=15360)"));
  text = with_free(need, 90);
  CHECK(has(text, "weights and working memory alone are 11.00 GiB over"));
  CHECK(text.find("n_ctx=") == std::string::npos && text.find("enough") == std::string::npos);
  MemoryNeed q8 = need;  // nothing to gain from what is small already
  q8.cache = q8.cache_q8_0;
  q8.head = q8.head_q4_0;
  text = with_free(q8, 107);
  CHECK(text.find("q8_0") == std::string::npos && text.find("head") == std::string::npos);
}

void test_architecture() {
  using hip::architecture_problem;
  CHECK(architecture_problem("gfx1151", 11, 5).empty());
  CHECK(architecture_problem("gfx1100 gfx1201", 12, 0).empty());
  CHECK(architecture_problem("gfx90a", 9, 0).empty());
  CHECK(architecture_problem("gfx1151", 10, 3) == "they are for gfx1151, and it is gfx10.3");
  CHECK(!architecture_problem("gfx1151", 11, 0).empty() && !architecture_problem("gfx1100", 11, 5).empty());
  CHECK(architecture_problem("90", 9, 0).empty() && architecture_problem("80", 8, 6).empty());
  CHECK(architecture_problem("80", 9, 0) == "they are for 80, and it is sm_90");
  CHECK(architecture_problem("90a", 9, 0).empty() && !architecture_problem("100a", 10, 3).empty());
  CHECK(!architecture_problem("86", 8, 0).empty() && architecture_problem("80 100", 10, 0).empty());
}

}  // namespace

int main() try {
  test_reader();
  test_page_cache();
  test_memory_problem();
  test_architecture();
  return test::report("test_loading");
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_loading: %s\n", e.what());
  return 2;
}
