#include "core/gguf.h"

#include <cstring>
#include <limits>

#include "core/error.h"
#include "quant/dtype.h"

namespace dflash {

namespace {

// Bytes of one element; 0 for strings and arrays.
size_t scalar_bytes(GgufType type) {
  switch (type) {
    case GgufType::U8:
    case GgufType::I8:
    case GgufType::Bool:
      return 1;
    case GgufType::U16:
    case GgufType::I16:
      return 2;
    case GgufType::U32:
    case GgufType::I32:
    case GgufType::F32:
      return 4;
    case GgufType::U64:
    case GgufType::I64:
    case GgufType::F64:
      return 8;
    case GgufType::String:
    case GgufType::Array:
      return 0;
  }
  return 0;
}

bool is_integer(GgufType type) {
  return type != GgufType::F32 && type != GgufType::F64 && type != GgufType::Bool && type != GgufType::String &&
         type != GgufType::Array;
}

template <typename T>
T load_as(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

constexpr uint64_t kMaxNameBytes = 65535;
constexpr const char* kTooMany = " are more than the file can hold; copy or convert the file again";
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // of one tensor; keeps every byte count below 2^63

}  // namespace

const char* gguf_type_name(GgufType type) {
  static constexpr const char* names[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                          "bool",  "string", "array",  "uint64", "int64",  "float64"};
  const uint32_t id = static_cast<uint32_t>(type);
  return id < 13 ? names[id] : "unknown";
}

// Walks the directory with one cursor; every read is checked against the end of the file.
class GgufParser {
 public:
  explicit GgufParser(const std::string& path) : g_(std::make_shared<Gguf>()) {
    g_->file_ = std::make_shared<MappedFile>(path);
  }

  std::shared_ptr<const Gguf> parse() {
    if (size() < 24) bad("a GGUF file has at least 24 bytes, found ", size());
    if (std::memcmp(base(), "GGUF", 4) != 0) bad("not a GGUF file (the first four bytes are not 'GGUF')");
    pos_ = 4;
    g_->version_ = read<uint32_t>("version");
    if (g_->version_ != 2 && g_->version_ != 3) {
      bad("GGUF version 2 or 3 (little endian) expected, found ", g_->version_);
    }
    const uint64_t n_tensors = read<uint64_t>("tensor count");
    const uint64_t n_keys = read<uint64_t>("key count");
    // The smallest entry is 13 bytes (key) or 24 bytes (tensor): anything larger cannot be true.
    if (n_keys > size() / 13) bad("truncated: ", n_keys, " keys", kTooMany);
    if (n_tensors > size() / 24) bad("truncated: ", n_tensors, " tensors", kTooMany);
    for (uint64_t i = 0; i < n_keys; ++i) parse_key();
    if (const int64_t parts = g_->get_int_or("split.count", 1, 0, 65535); parts > 1) {
      bad("this is part ", g_->get_int_or("split.no", 0, 0, 65535) + 1, " of ", parts,
          " of a file; join them first: llama-gguf-split --merge FIRST-PART OUT.gguf");
    }
    const size_t alignment = read_alignment();
    for (uint64_t i = 0; i < n_tensors; ++i) parse_tensor(alignment);
    place_tensors(alignment);
    return g_;
  }

 private:
  const uint8_t* base() const { return g_->file_->data(); }
  size_t size() const { return g_->file_->size(); }

  template <typename... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(g_->file_->path(), ": ", parts...);
  }

  void need(uint64_t bytes, const char* what) const {
    if (bytes > size() - pos_) {
      bad("truncated: ", what, " needs ", bytes, " bytes at offset ", pos_, ", ", size() - pos_,
          " are left; copy or convert the file again");
    }
  }

  template <typename T>
  T read(const char* what) {
    need(sizeof(T), what);
    const T value = load_as<T>(base() + pos_);
    pos_ += sizeof(T);
    return value;
  }

  std::string_view read_string(const char* what, uint64_t max_bytes) {
    const uint64_t n = read<uint64_t>(what);
    need(n, what);
    if (n > max_bytes) bad(what, " of ", n, " bytes at offset ", pos_, " is too long");
    const std::string_view s(reinterpret_cast<const char*>(base() + pos_), n);
    pos_ += n;
    return s;
  }

  GgufType read_type(const std::string& key) {
    const uint32_t id = read<uint32_t>("value type");
    if (id > 12) bad("key '", key, "': unknown value type ", id);
    return static_cast<GgufType>(id);
  }

  void parse_key() {
    const std::string key(read_string("key", kMaxNameBytes));
    Gguf::Value v;
    v.type = read_type(key);
    if (v.type == GgufType::Array) {
      v.is_array = true;
      v.type = read_type(key);
      if (v.type == GgufType::Array) bad("key '", key, "': arrays of arrays are not supported");
      v.count = read<uint64_t>("array length");
    }
    v.begin = pos_;
    if (v.type == GgufType::String) {
      if (v.count > (size() - pos_) / 8) bad("truncated: key '", key, "': ", v.count, " strings", kTooMany);
      for (uint64_t i = 0; i < v.count; ++i) read_string("string", size());
    } else {
      const size_t each = scalar_bytes(v.type);
      if (v.count > (size() - pos_) / each) bad("truncated: key '", key, "': ", v.count, " values", kTooMany);
      pos_ += v.count * each;
    }
    if (!g_->values_.emplace(key, v).second) bad("key '", key, "' appears twice");
    g_->keys_.push_back(key);
  }

  size_t read_alignment() const {
    const int64_t alignment = g_->get_int_or("general.alignment", 32, 1, 1 << 20);
    if ((alignment & (alignment - 1)) != 0) bad("general.alignment: a power of two expected, found ", alignment);
    return static_cast<size_t>(alignment);
  }

  void parse_tensor(size_t alignment) {
    Gguf::Tensor t;
    t.name = std::string(read_string("tensor name", kMaxNameBytes));
    const uint32_t n_dims = read<uint32_t>("dimension count");
    if (n_dims < 1 || n_dims > 4) bad("tensor '", t.name, "': 1 to 4 dimensions expected, found ", n_dims);
    uint64_t elements = 1;
    for (uint32_t d = 0; d < n_dims; ++d) {
      const uint64_t n = read<uint64_t>("dimension");
      if (n == 0 || n > kMaxElements / elements) bad("tensor '", t.name, "': impossible dimension ", n);
      elements *= n;
      t.ne.push_back(static_cast<int64_t>(n));
    }
    t.type_id = read<uint32_t>("tensor type");
    t.offset = read<uint64_t>("tensor offset");
    if (t.offset % alignment != 0) {
      bad("tensor '", t.name, "': offset ", t.offset, " is not a multiple of the alignment ", alignment);
    }
    if (const DTypeInfo* info = find_dtype(t.type_id)) {
      if (t.ne[0] % info->block != 0) {
        bad("tensor '", t.name, "': rows of ", t.ne[0], " elements are not whole ", info->name, " blocks of ",
            info->block);
      }
      t.bytes = static_cast<size_t>(elements / static_cast<uint64_t>(info->block)) * static_cast<size_t>(info->bytes);
    }
    if (!g_->tensor_index_.emplace(t.name, g_->tensors_.size()).second) bad("tensor '", t.name, "' appears twice");
    g_->tensors_.push_back(std::move(t));
  }

  // Offsets count from the first aligned byte after the directory.
  void place_tensors(size_t alignment) {
    const size_t data = (pos_ + alignment - 1) / alignment * alignment;
    for (Gguf::Tensor& t : g_->tensors_) {
      const size_t room = data <= size() ? size() - data : 0;
      if (t.offset > room || t.bytes > room - t.offset) {
        bad("truncated: tensor '", t.name, "' needs ", t.bytes, " bytes at offset ", data + t.offset, ", the file has ",
            size(), "; copy or convert the file again");
      }
      t.offset += data;
    }
  }

  std::shared_ptr<Gguf> g_;
  size_t pos_ = 0;
};

std::shared_ptr<const Gguf> Gguf::open(const std::string& path) { return GgufParser(path).parse(); }

const Gguf::Value* Gguf::find(const std::string& key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

const Gguf::Tensor* Gguf::find_tensor(const std::string& name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

int64_t Gguf::int_at(const Value& v, uint64_t i) const {
  const uint8_t* p = raw(v) + i * scalar_bytes(v.type);
  switch (v.type) {
    case GgufType::U8:
    case GgufType::Bool:
      return *p;
    case GgufType::I8:
      return load_as<int8_t>(p);
    case GgufType::U16:
      return load_as<uint16_t>(p);
    case GgufType::I16:
      return load_as<int16_t>(p);
    case GgufType::U32:
      return load_as<uint32_t>(p);
    case GgufType::I32:
      return load_as<int32_t>(p);
    case GgufType::I64:
      return load_as<int64_t>(p);
    case GgufType::U64: {
      const uint64_t u = load_as<uint64_t>(p);
      const uint64_t most = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
      return static_cast<int64_t>(u < most ? u : most);  // saturates: no field of ours comes near
    }
    default:
      return 0;
  }
}

double Gguf::float_at(const Value& v, uint64_t i) const {
  const uint8_t* p = raw(v) + i * scalar_bytes(v.type);
  if (v.type == GgufType::F32) return static_cast<double>(load_as<float>(p));
  if (v.type == GgufType::F64) return load_as<double>(p);
  return static_cast<double>(int_at(v, i));
}

std::vector<std::string_view> Gguf::strings(const Value& v) const {
  std::vector<std::string_view> out;
  if (v.type != GgufType::String) return out;
  out.reserve(v.count);
  const uint8_t* p = raw(v);
  for (uint64_t i = 0; i < v.count; ++i) {
    const uint64_t n = load_as<uint64_t>(p);
    out.emplace_back(reinterpret_cast<const char*>(p + 8), n);
    p += 8 + n;
  }
  return out;
}

namespace {

std::string describe(const Gguf::Value& v) { return cat(v.is_array ? "an array of " : "a ", gguf_type_name(v.type)); }

}  // namespace

int64_t Gguf::get_int(const std::string& key, int64_t min, int64_t max) const {
  const Value* v = find(key);
  if (v == nullptr) fail(path(), ": key '", key, "' is missing (an integer expected)");
  if (v->is_array || !is_integer(v->type)) fail(path(), ": key '", key, "': an integer expected, found ", describe(*v));
  const int64_t value = int_at(*v, 0);
  if (value < min || value > max) {
    fail(path(), ": key '", key, "': ", min, " to ", max, " expected, found ", value);
  }
  return value;
}

int64_t Gguf::get_int_or(const std::string& key, int64_t fallback, int64_t min, int64_t max) const {
  return has(key) ? get_int(key, min, max) : fallback;
}

double Gguf::get_float(const std::string& key) const {
  const Value* v = find(key);
  if (v == nullptr) fail(path(), ": key '", key, "' is missing (a number expected)");
  if (v->is_array || v->type == GgufType::String || v->type == GgufType::Bool) {
    fail(path(), ": key '", key, "': a number expected, found ", describe(*v));
  }
  return float_at(*v, 0);
}

double Gguf::get_float_or(const std::string& key, double fallback) const {
  return has(key) ? get_float(key) : fallback;
}

bool Gguf::get_bool_or(const std::string& key, bool fallback) const {
  const Value* v = find(key);
  if (v == nullptr) return fallback;
  if (v->is_array || v->type != GgufType::Bool)
    fail(path(), ": key '", key, "': a bool expected, found ", describe(*v));
  return int_at(*v, 0) != 0;
}

std::string Gguf::get_string(const std::string& key) const {
  const Value* v = find(key);
  if (v == nullptr) fail(path(), ": key '", key, "' is missing (a string expected)");
  if (v->is_array || v->type != GgufType::String) {
    fail(path(), ": key '", key, "': a string expected, found ", describe(*v));
  }
  return std::string(strings(*v)[0]);
}

std::vector<int64_t> Gguf::get_ints(const std::string& key) const {
  const Value* v = find(key);
  if (v == nullptr) fail(path(), ": key '", key, "' is missing (an array of integers expected)");
  if (!v->is_array || (!is_integer(v->type) && v->type != GgufType::Bool)) {
    fail(path(), ": key '", key, "': an array of integers expected, found ", describe(*v));
  }
  std::vector<int64_t> out(v->count);
  for (uint64_t i = 0; i < v->count; ++i) out[i] = int_at(*v, i);
  return out;
}

}  // namespace dflash
