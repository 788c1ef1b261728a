#pragma once
// Kernels of the offload bundles that a HIP compiler embeds: LLVM, "User Guide for AMDGPU Backend", code object V5.

#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace rdna {

// One ELF of a bundle, loaded.
class CodeObject {
 public:
  CodeObject(const uint8_t* elf, size_t bytes);
  CodeObject(const CodeObject&) = delete;
  CodeObject& operator=(const CodeObject&) = delete;

  std::vector<std::unique_ptr<Kernel>>& kernels() { return kernels_; }
  Region region() const;  // the loaded segments, which kernels may read
  // The disassembler's text of one kernel.
  std::string disassemble(const Kernel& kernel);

 private:
  void read_notes(const uint8_t* p, size_t bytes);

  std::vector<uint8_t> file_;
  std::vector<uint8_t> image_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::string path_;  // of the copy in memory that the disassembler reads; kept until the process ends
};

// The ELF for `target` in a fat binary's wrapper {magic, version, pointer to the bundle}. nullptr: there is none.
std::unique_ptr<CodeObject> open_bundle(const void* wrapper, const char* target);

}  // namespace rdna
