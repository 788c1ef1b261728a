#include "core/topology.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "core/error.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dflash {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// Processors that one group allows; 0: no limit, or nothing readable.
double group_quota(const std::string& v2_file, const std::string& v1_folder) {
  double quota = 0.0, period = 0.0;
  std::istringstream both(first_line(v2_file));
  if (!(both >> quota >> period)) {  // "max 100000" is no number
    std::istringstream(first_line(v1_folder + "/cpu.cfs_quota_us")) >> quota;
    std::istringstream(first_line(v1_folder + "/cpu.cfs_period_us")) >> period;
  }
  return quota > 0.0 && period > 0.0 ? quota / period : 0.0;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream in(text);
  int first = 0;
  while (in >> first && first >= 0) {
    int last = first;
    if (in.peek() == '-' && !(in.ignore() >> last)) break;
    if (last < first || last > (1 << 20)) break;
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    if (in.peek() != ',') break;
    in.ignore();
  }
  return cpus;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  // The kernel refuses a mask shorter than its own.
  for (int n = 1024; n <= (1 << 17) && cpus.empty(); n *= 2) {
    cpu_set_t* set = CPU_ALLOC(n);
    const size_t bytes = CPU_ALLOC_SIZE(n);
    if (set != nullptr && sched_getaffinity(0, bytes, set) == 0) {
      for (int cpu = 0; cpu < n; ++cpu) {
        if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
      }
    }
    CPU_FREE(set);
  }
#endif
  if (!cpus.empty()) return cpus;
  const int n = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int cpu = 0; cpu < n; ++cpu) cpus.push_back(cpu);
  return cpus;
}

int physical_cores(const std::vector<int>& cpus, const std::string& system) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string siblings = first_line(cat(system, "/cpu/cpu", cpu, "/topology/thread_siblings_list"));
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  return std::max(1, static_cast<int>(cores.size()));
}

int cpu_quota(const std::string& own, const std::string& groups) {
  // Lines "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1). Every group on the way up may set a limit. In a container the
  // path may be the host's while the files are those of the container's own group, at the root.
  double quota = 0.0;
  const auto limit = [&](const std::string& path) {
    const double q = group_quota(groups + path + "/cpu.max", groups + "/cpu" + path);
    if (q > 0.0) quota = quota > 0.0 ? std::min(quota, q) : q;
  };
  limit("");
  std::ifstream in(own);
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers != ",," && controllers.find(",cpu,") == std::string::npos) continue;
    for (std::string path = line.substr(second + 1); path.size() > 1; path.resize(path.rfind('/'))) {
      limit(path);
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  if (quota <= 0.0) return 0;
  return std::max(1, static_cast<int>(std::min(quota, 1e6)));
}

std::vector<int> numa_nodes(const std::vector<int>& cpus, const std::string& system) {
  std::vector<int> nodes;
  for (const int node : parse_cpu_list(first_line(system + "/node/online"))) {
    for (const int cpu : parse_cpu_list(first_line(cat(system, "/node/node", node, "/cpulist")))) {
      if (std::find(cpus.begin(), cpus.end(), cpu) == cpus.end()) continue;
      nodes.push_back(node);
      break;
    }
  }
  if (nodes.empty()) nodes.push_back(0);
  return nodes;
}

std::string interleave(void* p, size_t bytes, const std::vector<int>& nodes) {
#if defined(__linux__) && defined(SYS_mbind)
  constexpr int kInterleave = 3;  // MPOL_INTERLEAVE: no header of the C library has it
  constexpr size_t kWord = sizeof(unsigned long) * CHAR_BIT;
  std::vector<unsigned long> mask(1);
  for (const int node : nodes) {
    const size_t at = static_cast<size_t>(node) / kWord;
    if (at >= mask.size()) mask.resize(at + 1);
    mask[at] |= 1ul << (static_cast<size_t>(node) % kWord);
  }
  // The kernel takes one bit less than it is told.
  if (syscall(SYS_mbind, p, bytes, kInterleave, mask.data(), mask.size() * kWord + 1, 0ul) == 0) return "";
  return std::strerror(errno);
#else
  (void)p, (void)bytes, (void)nodes;
  return "not supported on this system";
#endif
}

std::string describe_numa() {
  const std::vector<int> nodes = numa_nodes(allowed_cpus());
  if (nodes.size() == 1) return "1 node";
  std::string problem = "no memory to try it on";
#if defined(__linux__)
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* p = mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p != MAP_FAILED) {
    problem = interleave(p, page, nodes);
    munmap(p, page);
  }
#endif
  if (problem.empty()) return cat(nodes.size(), " nodes, memory is interleaved over them");
  return cat(nodes.size(), " nodes, but interleaving is refused (", problem,
             "): memory stays where it is first touched");
}

}  // namespace dflash
