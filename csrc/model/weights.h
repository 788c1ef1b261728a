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

// Where a model's weights come from, by their names in a GGUF.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // [n_expert, n_out, n_in] of any supported type.
  virtual Weight stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) = 0;
  // [n] of type F32.
  virtual Weight vector(const std::string& name, int64_t n) = 0;
  // [n_out, n_in] of type F32 (the router).
  virtual Weight f32_matrix(const std::string& name, int64_t n_in, int64_t n_out) = 0;
  virtual bool has(const std::string& name) const = 0;

  // [n_out, n_in] of any supported type.
  Weight matrix(const std::string& name, int64_t n_in, int64_t n_out) { return stack(name, n_in, n_out, 1); }
};

class WeightLoader : public WeightSource {
 public:
  WeightLoader(std::shared_ptr<const Gguf> gguf, Backend& backend, std::string stage, Progress progress);

  Weight stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) override;
  Weight vector(const std::string& name, int64_t n) override;
  Weight f32_matrix(const std::string& name, int64_t n_in, int64_t n_out) override;
  bool has(const std::string& name) const override { return gguf_->find_tensor(name) != nullptr; }

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

// Counts the bytes of a model's matrices; its weights are empty.
class WeightCounter : public WeightSource {
 public:
  WeightCounter(DType matrices, DType head) : matrices_(matrices), head_(head) {}

  Weight stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) override;
  Weight vector(const std::string&, int64_t) override { return {}; }
  Weight f32_matrix(const std::string&, int64_t, int64_t) override { return {}; }
  bool has(const std::string&) const override { return true; }
  size_t bytes() const { return bytes_; }

 private:
  DType matrices_, head_;
  size_t bytes_ = 0;
};

// Random weights, for measuring shapes without files. Norms are 1 (those at the head of a block: branch_gain), the
// router's bias is 0.
class RandomWeights : public WeightSource {
 public:
  // head: type of embedding and head; every matrix has a seed of its own, counted up from seed.
  RandomWeights(Backend& backend, DType matrices, DType head, float branch_gain, uint64_t seed)
      : backend_(backend), matrices_(matrices), head_(head), branch_gain_(branch_gain), seed_(seed) {}

  Weight stack(const std::string& name, int64_t n_in, int64_t n_out, int64_t n_expert) override;
  Weight vector(const std::string& name, int64_t n) override;
  Weight f32_matrix(const std::string& name, int64_t n_in, int64_t n_out) override;
  bool has(const std::string&) const override { return true; }

 private:
  Backend& backend_;
  DType matrices_, head_;
  float branch_gain_;
  uint64_t seed_;
};

// values copied to backend memory as an F32 vector.
Weight upload_f32(Backend& backend, const std::vector<float>& values);

inline const float* f32(const Weight& w) { return static_cast<const float*>(w.data); }

}  // namespace dflash
