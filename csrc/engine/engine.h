#pragma once
// A target and, optionally, its drafter on one backend. Read-only after loading; sessions share it.
// A backend keeps scratch memory of its own, so sessions of one Model take turns (Python holds a lock).

#include <memory>
#include <optional>
#include <string>

#include "backend/backend.h"
#include "engine/session_options.h"
#include "model/dflash_drafter.h"
#include "model/minimax_m2.h"

namespace dflash {

struct DrafterOptions {
  std::string head = "target";  // which head it drafts with: "target" | "q8_0" | "q4_0" | "auto" (draft_head.h)
  // Replace what the drafter's file says; selftest tries the neighbours of the truth with them.
  int tap_shift = 0;           // added to every entry of target_layers
  int32_t mask_token_id = -1;  // -1: the file's
};

// Random weights, for measuring shapes without files.
struct SyntheticOptions {
  DType matrices = DType::Q4_0;
  DType head = DType::Q8_0;  // and embedding
  DType drafter = DType::Q8_0;
  std::optional<DType> draft_head{};  // none: the drafter borrows the target's
  // Weight of the layers' input norms. At 1 random layers drown what a row started from, rows grow alike layer by
  // layer and share their experts; smaller, rows stay apart and wake experts of their own.
  float branch_gain = 1.0f;
};

struct Model {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<MiniMaxM2> target;
  std::unique_ptr<DFlashDrafter> drafter;  // null: plain decoding (and prompt lookup)
  bool precise = false;
  uint64_t n_sessions = 0;     // made so far: names their recorded steps
  std::string memory_warning;  // CPU: more is needed than is free, so the machine may page; else ""

  // drafter_path may be empty. planned: the session that will be opened, so that its memory counts too (null: weights
  // alone). Throws Error naming the file and what is wrong, CapacityError before loading what a GPU cannot hold.
  static std::shared_ptr<Model> load(const std::string& target_path, const std::string& drafter_path,
                                     const BackendOptions& options, const Progress& progress,
                                     const DrafterOptions& drafting = {}, const SessionOptions* planned = nullptr);
  // drafter may be null.
  static std::shared_ptr<Model> synthetic(const TargetConfig& target, const DrafterConfig* drafter,
                                          const SyntheticOptions& synthetic, const BackendOptions& options,
                                          uint64_t seed);

  int block_size() const { return drafter ? drafter->config().block_size : kLookupBlock; }
  static constexpr int kLookupBlock = 16;  // anchor + drafts when only prompt lookup proposes
};

// The backends this build knows: name and why it cannot be used ("" when it can).
struct BackendStatus {
  std::string name;
  std::string problem;
};
std::vector<BackendStatus> backend_statuses();
std::unique_ptr<Backend> make_backend(const BackendOptions& options);

}  // namespace dflash
