#pragma once
// Takes tensors out of a GGUF by name, type and shape; what nobody took is an error too.

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/gguf.h"

namespace dflash {

// (stage, bytes done, bytes in all)
using Progress = std::function<void(const std::string&, size_t, size_t)>;

// A tensor of a known type as backends take it, in the file's mapping.
HostTensor host_tensor(const Gguf& gguf, const Gguf::Tensor& t);

class WeightLoader {
 public:
  WeightLoader(std::shared_ptr<const Gguf> gguf, Backend& backend, std::string stage, Progress progress);

  // [n_expert, n_out, n_in] of any supported type.
  Weight matrix(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert = 1);
  // [n] of type F32.
  Weight vector(const std::string& name, int64_t n);
  // The same as a matrix that must be F32 (the router).
  Weight f32_matrix(const std::string& name, int64_t n_in, int64_t n_out);
  bool has(const std::string& name) const { return gguf_->find_tensor(name) != nullptr; }

  void finish() const;  // throws when the file holds a tensor that was not taken
  size_t bytes() const { return done_; }

 private:
  Weight take(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert, bool must_be_f32);

  std::shared_ptr<const Gguf> gguf_;
  Backend& backend_;
  std::string stage_;
  Progress progress_;
  std::set<std::string> taken_;
  size_t done_ = 0, total_ = 0;
};

// values copied to backend memory as an F32 vector.
Weight upload_f32(Backend& backend, const std::vector<float>& values);

inline const float* f32(const Weight& w) { return static_cast<const float*>(w.data); }

}  // namespace dflash
