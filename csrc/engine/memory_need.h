#pragma once
// What a model and one timeline will take, known before anything is loaded, and what to say when it does not fit.

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/gguf.h"
#include "engine/session_options.h"
#include "model/config.h"

namespace dflash {

struct MemoryNeed {
  struct Part {
    std::string name;
    size_t bytes = 0;
  };
  std::vector<Part> parts;
  size_t total() const;

  // What could be made smaller. 0: nothing there.
  int n_ctx = 0;
  size_t cache = 0, cache_q8_0 = 0;  // both caches with kv_type as asked, and with q8_0
  size_t head = 0, head_q4_0 = 0;    // as it is, and as Q4_0
  size_t draft_head = 0;             // the drafter's copy of it
};

// weight_bytes says what a tensor will take in memory (Backend::weight_bytes). drafter may be null. Without a session
// (null) only the weights count. draft_head: the type of the drafter's copy of the head, if it has one.
MemoryNeed memory_need(const Gguf& target, const TargetConfig& target_config, const Gguf* drafter,
                       const DrafterConfig* drafter_config,
                       const std::function<size_t(const HostTensor&)>& weight_bytes, const SessionOptions* session,
                       bool precise, std::optional<DType> draft_head = std::nullopt);

// "" when need fits into what is free; else each part, how much is missing, and what would help, with figures.
std::string memory_problem(const MemoryNeed& need, const MemoryInfo& memory, const std::string& backend);

}  // namespace dflash
