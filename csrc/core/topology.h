#pragma once
// Which processors this process may use and how memory lies beside them, from what Linux says in files. Elsewhere, and
// where a file is missing, the answers are the simplest ones: every processor a core of one node, without a quota.

#include <string>
#include <vector>

namespace dflash {

// "0-3,8" -> 0 1 2 3 8. What cannot be read ends the list.
std::vector<int> parse_cpu_list(const std::string& text);

// The affinity mask.
std::vector<int> allowed_cpus();

// Cores among these processors: threads of one core count once.
int physical_cores(const std::vector<int>& cpus, const std::string& system = "/sys/devices/system");

// Processors' worth of time that the control groups of this process leave it (v1 and v2), rounded down but at least 1:
// a thread more would stop all of them for part of every period. 0: no limit.
int cpu_quota(const std::string& own = "/proc/self/cgroup", const std::string& groups = "/sys/fs/cgroup");

// The NUMA nodes these processors belong to, in order.
std::vector<int> numa_nodes(const std::vector<int>& cpus, const std::string& system = "/sys/devices/system");

// Spreads the pages of a range that nobody has touched yet over the nodes, in turn. Returns "" or why the system
// refuses (no NUMA in the kernel, a container that may not); then pages go where they are first touched.
std::string interleave(void* p, size_t bytes, const std::vector<int>& nodes);

// For people: how many nodes this process runs on and whether it may interleave.
std::string describe_numa();

}  // namespace dflash
