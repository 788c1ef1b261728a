#include "model/draft_head.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/error.h"
#include "core/file_reader.h"
#include "quant/encode.h"

namespace dflash {

namespace {

const char* const kHead = "output.weight";

void encode_row(DType type, const float* x, int64_t n, void* row) {
  if (type == DType::Q8_0) return encode_row(x, n, static_cast<BlockQ8_0*>(row));
  return encode_row(x, n, static_cast<BlockQ4_0*>(row));
}

}  // namespace

std::optional<DType> draft_head_type(const std::string& choice, const Gguf& target, bool copy_on_auto) {
  DType type = DType::Q4_0;
  if (choice == "q8_0") {
    type = DType::Q8_0;
  } else if (choice != "auto" && choice != "q4_0" && choice != "target") {
    fail("draft_head: 'auto', 'target', 'q8_0' or 'q4_0' expected, found '", choice, "'");
  }
  if (choice == "target" || (choice == "auto" && !copy_on_auto)) return std::nullopt;
  const Gguf::Tensor* head = target.find_tensor(kHead);
  if (head == nullptr || head->ne.size() != 2 || find_dtype(head->type_id) == nullptr) return std::nullopt;
  const int64_t n_in = head->ne[0];
  const DType own = static_cast<DType>(head->type_id);
  if (n_in % kGroup != 0 || row_bytes(type, n_in) >= row_bytes(own, n_in)) return std::nullopt;
  return type;
}

HostTensor draft_head_tensor(const Gguf& target, DType type) {
  HostTensor t = host_tensor(target, *target.find_tensor(kHead));
  t.name = "draft head";
  t.type = type;
  t.bytes = row_bytes(type, t.n_in) * static_cast<size_t>(t.n_out);
  t.data = nullptr;
  t.file_mapping = false;
  t.path.clear();
  t.file_offset = 0;
  return t;
}

Weight load_draft_head(const Gguf& target, DType type, Backend& backend, const Progress& progress) {
  const Gguf::Tensor& head = *target.find_tensor(kHead);
  const DType from = static_cast<DType>(head.type_id);
  HostTensor copy = draft_head_tensor(target, type);
  const auto bytes = std::make_shared<std::vector<uint8_t>>(copy.bytes);
  const size_t row_in = row_bytes(from, copy.n_in), row_out = row_bytes(type, copy.n_in);
  // Through a reader of its own, which leaves nothing in the page cache: the mapping's pages may have been dropped.
  const int64_t piece = std::max<int64_t>(1, static_cast<int64_t>((size_t{16} << 20) / row_in));  // rows
  FileReader reader(target.path());
  // buffer_bytes() is a multiple of the alignment, as aligned_alloc wants it.
  const size_t buffer_bytes = FileReader::buffer_bytes(static_cast<size_t>(piece) * row_in);
  const std::unique_ptr<void, void (*)(void*)> buffer(std::aligned_alloc(FileReader::kAlign, buffer_bytes), std::free);
  if (!buffer) throw CapacityError("draft head: no memory for a reading buffer; draft_head='target' needs none");
  std::vector<float> values(static_cast<size_t>(copy.n_in));
  for (int64_t first = 0; first < copy.n_out; first += piece) {
    const int64_t rows = std::min(piece, copy.n_out - first);
    const char* in = reader.read(head.offset + static_cast<uint64_t>(first) * row_in,
                                 static_cast<size_t>(rows) * row_in, buffer.get());
    for (int64_t r = 0; r < rows; ++r) {
      decode_row(from, in + static_cast<size_t>(r) * row_in, copy.n_in, values.data());
      encode_row(type, values.data(), copy.n_in, bytes->data() + static_cast<size_t>(first + r) * row_out);
    }
    if (progress) progress("draft head", static_cast<size_t>(first + rows) * row_in, head.bytes);
  }
  copy.data = bytes->data();
  return backend.load(copy, bytes);
}

}  // namespace dflash
