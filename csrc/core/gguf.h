#pragma once
// Strict, lazy GGUF reader (format: ggml docs/gguf.md, versions 2 and 3, little endian). Opening walks the directory
// once and checks every length against the file; values are decoded when asked for, so a 200k-token vocabulary costs
// a walk over its lengths and nothing more.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/mapped_file.h"

namespace dflash {

enum class GgufType : uint32_t {
  U8 = 0,
  I8 = 1,
  U16 = 2,
  I16 = 3,
  U32 = 4,
  I32 = 5,
  F32 = 6,
  Bool = 7,
  String = 8,
  Array = 9,
  U64 = 10,
  I64 = 11,
  F64 = 12
};

class Gguf {
 public:
  struct Value {
    GgufType type = GgufType::U8;  // element type when is_array
    bool is_array = false;
    uint64_t count = 1;
    size_t begin = 0;  // byte offset of the first element
  };

  struct Tensor {
    std::string name;
    uint32_t type_id = 0;     // ggml type; quant/dtype.h knows some
    std::vector<int64_t> ne;  // fastest dimension first
    size_t offset = 0;        // from the start of the file
    size_t bytes = 0;         // 0 when the type is not one of ours
  };

  // Throws Error naming the file and what is wrong with it.
  static std::shared_ptr<const Gguf> open(const std::string& path);

  const std::string& path() const { return file_->path(); }
  uint32_t version() const { return version_; }
  const MappedFile& file() const { return *file_; }
  std::shared_ptr<const MappedFile> share_file() const { return file_; }

  const std::vector<std::string>& keys() const { return keys_; }
  const Value* find(const std::string& key) const;
  bool has(const std::string& key) const { return find(key) != nullptr; }

  // Scalars, range- and type-checked; the error names file, key, expected and found.
  int64_t get_int(const std::string& key, int64_t min, int64_t max) const;
  int64_t get_int_or(const std::string& key, int64_t fallback, int64_t min, int64_t max) const;
  double get_float(const std::string& key) const;
  double get_float_or(const std::string& key, double fallback) const;
  bool get_bool_or(const std::string& key, bool fallback) const;
  std::string get_string(const std::string& key) const;
  std::vector<int64_t> get_ints(const std::string& key) const;

  // Element i of a value, whatever its width. Strings only through string_at / strings.
  int64_t int_at(const Value& v, uint64_t i) const;
  double float_at(const Value& v, uint64_t i) const;
  std::vector<std::string_view> strings(const Value& v) const;
  const uint8_t* raw(const Value& v) const { return file_->data() + v.begin; }

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const Tensor* find_tensor(const std::string& name) const;
  const void* tensor_data(const Tensor& t) const { return file_->data() + t.offset; }

 private:
  std::shared_ptr<const MappedFile> file_;
  uint32_t version_ = 0;
  std::vector<std::string> keys_;  // file order
  std::unordered_map<std::string, Value> values_;
  std::vector<Tensor> tensors_;  // file order
  std::unordered_map<std::string, size_t> tensor_index_;

  friend class GgufParser;
};

const char* gguf_type_name(GgufType type);

}  // namespace dflash
