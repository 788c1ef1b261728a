#pragma once
// Runs launches of a kernel on the host's threads, a work group at a time on each.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace rdna {

struct Options {
  bool reverse_waves = false;  // of a group, between two barriers
  bool reverse_groups = false;
  bool check_waits = true;  // a register that an outstanding load still writes
  bool check_alignment = false;
  bool check_races = true;  // LDS touched by two waves, one of them writing, and no barrier between
  int threads = 0;          // of the host; 0: all
};

struct Launch {
  Kernel* kernel;  // decoded
  uint32_t grid[3], block[3];
  uint32_t dynamic_lds;
  std::vector<uint8_t> arguments;  // kernel.argument_bytes
};

class Interpreter {
 public:
  // Throws Fault that says where: kernel, group, wave, instruction.
  void run(const Launch& launch, const std::vector<Region>& memory, const Options& options);

 private:
  struct Worker {
    std::vector<std::unique_ptr<Wave>> waves;
    Group group;
    std::vector<uint64_t> times, lanes, misaligned;
  };
  void run_group(Worker& worker, const Launch& launch, uint32_t number, const Options& options);
  std::vector<std::unique_ptr<Worker>> workers_;
};

// A kernel's name as written, without its namespaces and parameters.
std::string readable_name(const std::string& mangled);

// What was executed so far, a kernel a row.
std::string counts_table(const std::vector<const Kernel*>& kernels);

// One kernel's instructions with how often a wave executed each.
std::string profile(const Kernel& kernel);

}  // namespace rdna
