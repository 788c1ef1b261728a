// The GGUF reader under damage: every truncation and thousands of bit flips end in dflash::Error or in a file that
// reads within bounds. Run under the sanitizers in .ci/run.

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/gguf.h"
#include "model/config.h"
#include "quant/blocks.h"

using namespace dflash;

namespace {

class Writer {
 public:
  template <typename T>
  Writer& put(T value) {
    const auto* p = reinterpret_cast<const uint8_t*>(&value);
    bytes.insert(bytes.end(), p, p + sizeof(T));
    return *this;
  }
  Writer& text(const std::string& s) {
    put<uint64_t>(s.size());
    bytes.insert(bytes.end(), s.begin(), s.end());
    return *this;
  }
  std::vector<uint8_t> bytes;
};

std::vector<uint8_t> small_file() {
  Writer w;
  w.bytes = {'G', 'G', 'U', 'F'};
  w.put<uint32_t>(3).put<uint64_t>(2).put<uint64_t>(6);
  w.text("general.architecture").put<uint32_t>(8).text("minimax-m2");
  w.text("general.alignment").put<uint32_t>(4).put<uint32_t>(32);
  w.text("minimax-m2.block_count").put<uint32_t>(4).put<uint32_t>(1);
  w.text("minimax-m2.rope.freq_base").put<uint32_t>(6).put<float>(5e6f);
  w.text("tokens").put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(3).text("a").text("bc").text("");
  w.text("dflash.target_layers").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(2).put<int32_t>(1).put<int32_t>(2);
  w.text("token_embd.weight").put<uint32_t>(2).put<uint64_t>(32).put<uint64_t>(3).put<uint32_t>(2).put<uint64_t>(0);
  w.text("norm").put<uint32_t>(1).put<uint64_t>(5).put<uint32_t>(0).put<uint64_t>(64);
  while (w.bytes.size() % 32 != 0) w.put<uint8_t>(0);
  w.bytes.resize(w.bytes.size() + 64 + 20, 7);
  return w.bytes;
}

class TempFile {
 public:
  TempFile() : path("/tmp/dflash-test-" + std::to_string(::getpid()) + ".gguf") {}
  ~TempFile() { std::remove(path.c_str()); }
  void write(const std::vector<uint8_t>& bytes) const {
    std::FILE* f = std::fopen(path.c_str(), "wb");
    if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), f);
    std::fclose(f);
  }
  const std::string path;
};

// Touches everything a caller can touch. Returns whether the file was accepted.
bool read_everything(const std::string& path) {
  try {
    const auto g = Gguf::open(path);
    size_t seen = 0;
    for (const std::string& key : g->keys()) {
      const Gguf::Value* v = g->find(key);
      if (v->type == GgufType::String) {
        for (const std::string_view s : g->strings(*v)) seen += s.size();
      } else {
        for (uint64_t i = 0; i < v->count; ++i) seen += g->float_at(*v, i) > 0.0;
      }
    }
    std::vector<float> row;
    for (const Gguf::Tensor& t : g->tensors()) {
      if (find_dtype(t.type_id) == nullptr || t.ne[0] > 1 << 16) continue;
      row.resize(static_cast<size_t>(t.ne[0]));
      std::vector<uint8_t> copy(row_bytes(static_cast<DType>(t.type_id), t.ne[0]));
      std::memcpy(copy.data(), g->tensor_data(t), copy.size());
      decode_row(static_cast<DType>(t.type_id), copy.data(), t.ne[0], row.data());
    }
    try {
      read_target_config(*g);
    } catch (const Error&) {
    }
    try {
      read_drafter_config(*g);
    } catch (const Error&) {
    }
    return seen + 1 > 0;
  } catch (const Error&) {
    return false;
  }
}

void test_damage() {
  const TempFile file;
  const std::vector<uint8_t> good = small_file();
  file.write(good);
  CHECK(read_everything(file.path));
  for (size_t n = 0; n < good.size(); ++n) {
    file.write(std::vector<uint8_t>(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n)));
    CHECK(!read_everything(file.path));
  }
  std::mt19937 random(7);
  int accepted = 0;
  for (int i = 0; i < 4000; ++i) {
    std::vector<uint8_t> bad = good;
    for (unsigned flips = 1 + random() % 4; flips > 0; --flips) {
      bad[random() % bad.size()] ^= static_cast<uint8_t>(1u << (random() % 8));
    }
    file.write(bad);
    accepted += read_everything(file.path) ? 1 : 0;  // flips in names and data may stay readable
  }
  CHECK(accepted > 0 && accepted < 4000);
}

void test_messages() {
  const TempFile file;
  CHECK_THROWS(Gguf::open("/nonexistent/x.gguf"), "/nonexistent/x.gguf: cannot open");
  CHECK_THROWS(Gguf::open("/tmp"), "expected a file");
  file.write({'h', 'e', 'l', 'l', 'o'});
  CHECK_THROWS(Gguf::open(file.path), "at least 24 bytes");
  std::vector<uint8_t> bytes = small_file();
  bytes[0] = 'X';
  file.write(bytes);
  CHECK_THROWS(Gguf::open(file.path), "not a GGUF file");
  bytes = small_file();
  bytes.resize(bytes.size() - 1);
  file.write(bytes);
  CHECK_THROWS(Gguf::open(file.path), "truncated: tensor 'norm'");
  file.write(small_file());
  const auto g = Gguf::open(file.path);
  CHECK_THROWS(g->get_int("missing", 0, 1), "key 'missing' is missing");
  CHECK_THROWS(g->get_int("tokens", 0, 1), "an integer expected, found an array of string");
  CHECK_THROWS(read_target_config(*g), "minimax-m2.embedding_length");
  CHECK_THROWS(read_drafter_config(*g), "'dflash' expected for the drafter, found 'minimax-m2'");
  CHECK(g->get_ints("dflash.target_layers") == (std::vector<int64_t>{1, 2}));
  CHECK(g->strings(*g->find("tokens")).size() == 3);
}

void test_half() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const float f = f16_to_f32(bits);
    if (f == f) CHECK(f32_to_f16(f) == bits);
    const float b = bf16_to_f32(bits);
    if (b == b) CHECK(f32_to_bf16(b) == bits);
  }
  CHECK(f32_to_f16(65519.0f) == 0x7bff && f32_to_f16(65520.0f) == 0x7c00);      // ties to even at the top
  CHECK(f32_to_f16(2.9802322387695312e-8f) == 0 && f32_to_f16(2.99e-8f) == 1);  // and at half a subnormal
  CHECK(f32_to_f16(1.00048828125f) == 0x3c00 && f32_to_f16(1.00146484375f) == 0x3c02);
}

}  // namespace

int main() {
  test_damage();
  test_messages();
  test_half();
  return test::report("test_gguf");
}
