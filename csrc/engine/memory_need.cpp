#include "engine/memory_need.h"

#include <algorithm>

#include "core/error.h"
#include "core/units.h"
#include "engine/engine.h"
#include "model/draft_head.h"
#include "model/kv_cache.h"
#include "model/weights.h"

namespace dflash {

namespace {

// Beside what is counted: partial results of attention, recorded steps, the runtime's own.
constexpr size_t kOther = size_t{128} << 20;

size_t floats(int64_t rows, int64_t n) { return static_cast<size_t>(rows * n) * sizeof(float); }

// The session's buffers, and what a backend needs for one prefill pass through attention and experts.
size_t working_memory(const TargetConfig& t, const DrafterConfig* d, int n_batch) {
  const int block = d != nullptr ? d->block_size : Model::kLookupBlock;
  const int64_t rows = std::max(n_batch, block);
  size_t bytes = MiniMaxM2::Scratch::bytes_for(t, static_cast<int>(rows)) + floats(block, t.n_vocab);
  bytes += floats(rows * t.n_expert_used, t.n_embd + t.n_ff) + floats(rows, 2 * t.n_embd);
  if (d != nullptr) {
    const int64_t taps = static_cast<int64_t>(d->target_layers.size()) * t.n_embd;
    bytes += DFlashDrafter::Scratch::bytes_for(*d, static_cast<int>(rows)) +
             floats(rows + kPendingTaps + 2 * static_cast<int64_t>(block), taps) + floats(rows, taps) / 2;
  }
  return bytes + kOther;
}

}  // namespace

size_t MemoryNeed::total() const {
  size_t sum = 0;
  for (const Part& part : parts) sum += part.bytes;
  return sum;
}

MemoryNeed memory_need(const Gguf& target, const TargetConfig& t, const Gguf* drafter, const DrafterConfig* d,
                       const std::function<size_t(const HostTensor&)>& weight_bytes, const SessionOptions* session,
                       bool precise, std::optional<DType> draft_head) {
  MemoryNeed need;
  const auto weights = [&](const Gguf& file, const char* name) {
    size_t sum = 0;
    for (const Gguf::Tensor& tensor : file.tensors()) {
      if (find_dtype(tensor.type_id) == nullptr) continue;  // refused by name when it is loaded
      const HostTensor host = host_tensor(file, tensor);
      const size_t bytes = weight_bytes(host);
      sum += bytes;
      if (tensor.name != "output.weight") continue;
      need.head = bytes;
      if (host.n_in % dtype_info(DType::Q4_0).block == 0) {
        need.head_q4_0 = row_bytes(DType::Q4_0, host.n_in) * static_cast<size_t>(host.n_out);
      }
    }
    need.parts.push_back({name, sum});
  };
  weights(target, "target weights");
  if (drafter != nullptr) weights(*drafter, "drafter weights");
  if (draft_head) {
    need.draft_head = weight_bytes(draft_head_tensor(target, *draft_head));
    need.parts.push_back({cat("draft head (", dtype_info(*draft_head).name, ")"), need.draft_head});
  }
  if (session == nullptr) return need;

  const DType type = kv_dtype(session->kv_type, precise);
  need.n_ctx = session->n_ctx;
  const auto cache = [&](DType kv) {
    return KvCache::bytes_for(t.n_layer, t.n_head_kv, t.head_dim, session->n_ctx, kv);
  };
  need.parts.push_back({cat("cache of ", session->n_ctx, " tokens (", dtype_info(type).name, ")"), cache(type)});
  need.cache = cache(type);
  if (t.head_dim % dtype_info(DType::Q8_0).block == 0) need.cache_q8_0 = cache(DType::Q8_0);
  if (d != nullptr) {
    const size_t own = KvCache::bytes_for(d->n_layer, d->n_head_kv, d->head_dim, session->n_ctx + d->block_size,
                                          drafter_kv_dtype(precise));
    need.parts.push_back({"drafter's cache", own});
    need.cache += own;
    need.cache_q8_0 += own;
  }
  need.parts.push_back(
      {cat("working memory (n_batch ", session->n_batch, ")"), working_memory(t, d, session->n_batch)});
  return need;
}

std::string memory_problem(const MemoryNeed& need, const MemoryInfo& memory, const std::string& backend) {
  const size_t total = need.total();
  if (total <= memory.free) return "";
  std::string parts;
  for (const MemoryNeed::Part& part : need.parts) {
    parts += cat(parts.empty() ? "" : ", ", part.name, " ", human_bytes(part.bytes));
  }
  const size_t lack = total - memory.free;
  std::vector<std::string> help;
  // The longest context that fits beside `fixed` bytes, when `cache` bytes hold need.n_ctx tokens.
  const auto context = [&](size_t cache) {
    const size_t fixed = total - need.cache;
    if (cache == 0 || fixed >= memory.free) return 0;
    const double fits = static_cast<double>(memory.free - fixed) / static_cast<double>(cache) * need.n_ctx;
    return static_cast<int>(std::min(fits, 1e9)) / 64 * 64;
  };
  if (const int n = context(need.cache); n > 0) help.push_back(cat("n_ctx=", n));
  if (need.cache_q8_0 > 0 && need.cache_q8_0 < need.cache) {
    const size_t saved = need.cache - need.cache_q8_0;
    const int n = context(need.cache_q8_0);
    const std::string effect = saved >= lack ? ", enough" : n > 0 ? cat(", enough with n_ctx=", n) : std::string();
    help.push_back(cat("kv_type='q8_0' (saves ", human_bytes(saved), effect, ")"));
  }
  if (need.head_q4_0 > 0 && need.head_q4_0 < need.head) {
    const size_t saved = need.head - need.head_q4_0;
    help.push_back(cat("a Q4_0 head (saves ", human_bytes(saved), saved >= lack ? ", enough)" : ")"));
  }
  if (need.draft_head > 0) {
    help.push_back(
        cat("draft_head='target' (saves ", human_bytes(need.draft_head), need.draft_head >= lack ? ", enough)" : ")"));
  }
  if (need.n_ctx > 0 && total - need.cache >= memory.free) {
    help.push_back(cat("weights and working memory alone are ", human_bytes(total - need.cache - memory.free),
                       " over: other programs off this memory, or a machine with more"));
  }
  if (!memory.hint.empty()) help.push_back(memory.hint);
  std::string advice;
  for (const std::string& h : help) advice += (advice.empty() ? "" : "; ") + h;
  return cat("memory: ", human_bytes(total), " needed on ", backend, ", ", human_bytes(memory.free), " free of ",
             human_bytes(memory.total), ": ", human_bytes(lack), " short. Needed: ", parts,
             advice.empty() ? "" : ". What would help: ", advice, ".");
}

}  // namespace dflash
