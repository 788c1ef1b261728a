#pragma once
// From the text of a disassembler to instructions that run.

#include "operands.h"

namespace rdna {

// llvm-objdump's lines of one kernel: "<text> // <address>: <words>". Throws Fault at an instruction, operand or
// modifier that is not known.
std::vector<Instruction> decode(const std::string& disassembly, const Operations& operations);

}  // namespace rdna
