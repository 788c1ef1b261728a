#include "model/weights.h"

#include "core/error.h"

namespace dflash {

HostTensor host_tensor(const Gguf& gguf, const Gguf::Tensor& t) {
  const auto n = [&](size_t i) { return i < t.ne.size() ? t.ne[i] : 1; };
  HostTensor host;
  host.name = t.name;
  host.type = dtype_info(static_cast<DType>(t.type_id)).type;
  host.n_in = n(0);
  host.n_out = n(1);
  host.n_expert = n(2);
  host.data = gguf.tensor_data(t);
  host.bytes = t.bytes;
  host.file_mapping = true;
  host.path = gguf.path();
  host.file_offset = t.offset;
  return host;
}

WeightLoader::WeightLoader(std::shared_ptr<const Gguf> gguf, Backend& backend, std::string stage, Progress progress)
    : gguf_(std::move(gguf)), backend_(backend), stage_(std::move(stage)), progress_(std::move(progress)) {
  for (const Gguf::Tensor& t : gguf_->tensors()) total_ += t.bytes;
  if (progress_) progress_(stage_, 0, total_);
}

Weight WeightLoader::take(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert, bool must_be_f32) {
  const Gguf::Tensor* t = gguf_->find_tensor(name);
  if (t == nullptr) fail(gguf_->path(), ": tensor '", name, "' is missing");
  std::vector<int64_t> found = t->ne;
  while (found.size() < 3) found.push_back(1);
  if (found != std::vector<int64_t>{n_in, n_out, n_expert}) {
    std::string shape;
    for (const int64_t n : t->ne) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
    fail(gguf_->path(), ": tensor '", name, "': shape {", n_in, ", ", n_out, ", ", n_expert,
         "} (fastest first) expected from the metadata, found {", shape, "}");
  }
  const DTypeInfo* info = find_dtype(t->type_id);
  if (info == nullptr) {
    std::string known;
    for (const DTypeInfo& d : kDTypes) known += std::string(known.empty() ? "" : ", ") + d.name;
    fail(gguf_->path(), ": tensor '", name, "': type id ", t->type_id, " is not supported (", known,
         "); convert the checkpoint with 'dflash-cpp convert'");
  }
  if (must_be_f32 && info->type != DType::F32) {
    fail(gguf_->path(), ": tensor '", name, "': F32 expected, found ", info->name);
  }
  Weight w = backend_.load(host_tensor(*gguf_, *t), gguf_->share_file());
  taken_.insert(name);
  done_ += t->bytes;
  if (progress_) progress_(stage_, done_, total_);
  return w;
}

Weight WeightLoader::stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) {
  return take(name, n_in, n_out, n_expert, false);
}

Weight WeightLoader::f32_matrix(const std::string& name, int64_t n_in, int64_t n_out) {
  return take(name, n_in, n_out, 1, true);
}

Weight WeightLoader::vector(const std::string& name, int64_t n) { return take(name, n, 1, 1, true); }

namespace {

bool is_head(const std::string& name) { return name == "token_embd.weight" || name == "output.weight"; }

}  // namespace

Weight WeightCounter::stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) {
  bytes_ += row_bytes(is_head(name) ? head_ : matrices_, n_in) * static_cast<size_t>(n_out * n_expert);
  return {};
}

Weight RandomWeights::stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) {
  return backend_.random_weight(is_head(name) ? head_ : matrices_, n_in, n_out, n_expert, ++seed_);
}

Weight RandomWeights::f32_matrix(const std::string&, int64_t n_in, int64_t n_out) {
  return backend_.random_weight(DType::F32, n_in, n_out, 1, ++seed_);
}

Weight RandomWeights::vector(const std::string& name, int64_t n) {
  const auto is = [&](const char* end) { return name.find(end) != std::string::npos; };
  const float value = is("exp_probs_b") ? 0.0f : is(".attn_norm.") || is(".ffn_norm.") ? branch_gain_ : 1.0f;
  return upload_f32(backend_, std::vector<float>(static_cast<size_t>(n), value));
}

Weight upload_f32(Backend& backend, const std::vector<float>& values) {
  Buffer buffer = backend.alloc(values.size() * sizeof(float));
  backend.upload(buffer.data, values.data(), values.size() * sizeof(float));
  Weight w;
  w.n_in = static_cast<int64_t>(values.size());
  w.n_out = 1;
  w.data = buffer.data;
  w.owner = buffer.owner;
  return w;
}

void WeightLoader::finish() const {
  for (const Gguf::Tensor& t : gguf_->tensors()) {
    if (taken_.count(t.name) == 0) {
      fail(gguf_->path(), ": tensor '", t.name, "' is not part of this architecture; a newer or different model?");
    }
  }
}

}  // namespace dflash
