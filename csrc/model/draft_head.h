#pragma once
// A smaller copy of the target's output head, for the drafter alone. A round reads the head twice: once to draft, once
// to verify. Drafts are proposals, so rounding the first of these cannot change the text, only how often drafts stand;
// a head of 200,064 tokens is most of what drafting costs (docs/speculation.md, "The draft head").

#include <optional>
#include <string>

#include "backend/backend.h"
#include "core/gguf.h"
#include "model/weights.h"

namespace dflash {

// The type of the copy, or none: the drafter then borrows the target's head itself. choice: "target" (no copy), "q8_0",
// "q4_0", or "auto" (Q4_0 where copy_on_auto). There is no copy where it would be no smaller than the head.
// Throws Error for another choice.
std::optional<DType> draft_head_type(const std::string& choice, const Gguf& target, bool copy_on_auto);

// The copy as a tensor without data: name, type and shape. target has a head (draft_head_type said so).
HostTensor draft_head_tensor(const Gguf& target, DType type);

// Reads the target's head from its file, rounds it to `type` and loads it.
Weight load_draft_head(const Gguf& target, DType type, Backend& backend, const Progress& progress);

}  // namespace dflash
