// Processors, quotas and NUMA nodes as Linux describes them, from made-up files; the policy of real memory, where the
// kernel has one.

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "backend/backend.h"
#include "check.h"
#include "core/thread_pool.h"
#include "core/topology.h"

using namespace dflash;

namespace {

using Ints = std::vector<int>;

struct Root {
  std::string path;
  Root() {
    char name[] = "/tmp/dflash_test_topology.XXXXXX";
    if (mkdtemp(name) == nullptr) fail(name, ": cannot create");
    path = name;
  }
  ~Root() { std::filesystem::remove_all(path); }
  void put(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path + file).parent_path());
    std::ofstream(path + file) << text << "\n";
  }
};

void test_lists() {
  CHECK(parse_cpu_list("0") == Ints{0});
  CHECK(parse_cpu_list("0-3,8,10-11") == (Ints{0, 1, 2, 3, 8, 10, 11}));
  CHECK(parse_cpu_list("").empty() && parse_cpu_list("x").empty() && parse_cpu_list("-1").empty());
  CHECK(parse_cpu_list("2,5-") == Ints{2} && parse_cpu_list("3-1").empty() && parse_cpu_list("1 2") == Ints{1});
  CHECK(parse_cpu_list("0-99999999999").empty());
}

void test_cores() {
  Root root;  // four cores of two threads: 0 and 4, 1 and 5, ...
  for (int cpu = 0; cpu < 8; ++cpu) {
    root.put(cat("/cpu/cpu", cpu, "/topology/thread_siblings_list"), cat(cpu % 4, ",", cpu % 4 + 4));
  }
  CHECK(physical_cores({0, 1, 2, 3, 4, 5, 6, 7}, root.path) == 4);
  CHECK(physical_cores({0, 4}, root.path) == 1);
  CHECK(physical_cores({1, 2, 6}, root.path) == 2);
  CHECK(physical_cores({1, 8, 9}, root.path) == 3);  // nothing is said about 8 and 9
  CHECK(physical_cores({}, root.path) == 1);
}

void test_nodes() {
  Root root;
  CHECK(numa_nodes({0, 1}, root.path) == Ints{0});  // no such files: one node
  root.put("/node/online", "0-1,3");
  root.put("/node/node0/cpulist", "0-3");
  root.put("/node/node1/cpulist", "4-7");
  root.put("/node/node3/cpulist", "");  // memory without processors
  CHECK(numa_nodes({0, 1, 2, 3, 4, 5, 6, 7}, root.path) == (Ints{0, 1}));
  CHECK(numa_nodes({5, 6}, root.path) == Ints{1});
  CHECK(numa_nodes({9}, root.path) == Ints{0});
}

void test_quota() {
  Root root;
  const std::string own = root.path + "/cgroup";
  CHECK(cpu_quota(own, root.path) == 0);  // no such files: no limit
  root.put("/cgroup", "0::/system/job");
  root.put("/system/job/cpu.max", "max 100000");
  CHECK(cpu_quota(own, root.path) == 0);
  root.put("/system/cpu.max", "350000 100000");  // of the group above
  CHECK(cpu_quota(own, root.path) == 3);
  root.put("/system/job/cpu.max", "50000 100000");
  CHECK(cpu_quota(own, root.path) == 1);
  root.put("/system/job/cpu.max", "800000 100000");
  CHECK(cpu_quota(own, root.path) == 3);
  root.put("/cpu.max", "200000 100000");  // a container sees its own group at the root
  CHECK(cpu_quota(own, root.path) == 2);

  Root old;
  old.put("/cgroup", "4:cpu,cpuacct:/job\n3:memory:/other\n0::/");
  old.put("/cpu/job/cpu.cfs_quota_us", "600000");
  old.put("/cpu/job/cpu.cfs_period_us", "100000");
  CHECK(cpu_quota(old.path + "/cgroup", old.path) == 6);
  old.put("/cpu/job/cpu.cfs_quota_us", "-1");
  CHECK(cpu_quota(old.path + "/cgroup", old.path) == 0);
}

// A mask narrower than the machine is respected, and its threads keep to it.
void test_affinity() {
  const Ints before = allowed_cpus();
  cpu_set_t old, one;
  CPU_ZERO(&one);
  CPU_SET(static_cast<size_t>(before.back()), &one);
  if (sched_getaffinity(0, sizeof(old), &old) != 0 || sched_setaffinity(0, sizeof(one), &one) != 0) {
    std::printf("affinity: cannot be set here\n");
    return;
  }
  CHECK(allowed_cpus() == Ints{before.back()} && ThreadPool::default_threads() == 1);
  {
    ThreadPool pool(3);
    std::atomic<bool> kept{true};
    for (int round = 0; round < 20; ++round) {
      pool.parallel_for(3, [&](int64_t, int) {
        if (allowed_cpus() != Ints{before.back()}) kept = false;
      });
    }
    CHECK(kept);
  }
  (void)sched_setaffinity(0, sizeof(old), &old);
  CHECK(allowed_cpus() == before && ThreadPool::default_threads() <= static_cast<int>(before.size()));
}

// -1: this kernel has no policies.
int policy_of(const void* p) {
  int mode = -1;
  constexpr unsigned long kOfAddress = 2;  // MPOL_F_ADDR
  return syscall(SYS_get_mempolicy, &mode, nullptr, 0ul, p, kOfAddress) == 0 ? mode : -1;
}

void test_policies() {
  constexpr int kDefault = 0, kInterleave = 3;
  constexpr size_t kBytes = 8 << 20;
  void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool visible = policy_of(p) == kDefault && interleave(p, 4096, numa_nodes(allowed_cpus())).empty();
  // No machine has this node: said, not thrown, and the memory is as good as before.
  CHECK(!interleave(p, kBytes, {1000}).empty());
  std::memset(p, 1, kBytes);
  munmap(p, kBytes);

  for (const char* numa : {"auto", "off", "interleave"}) {
    BackendOptions o;
    o.n_threads = 1;
    o.numa = numa;
    const auto backend = make_cpu_backend(o);
    const Buffer b = backend->alloc(kBytes);
    const bool several = numa_nodes(allowed_cpus()).size() > 1;
    const bool expected = o.numa == "interleave" || (o.numa == "auto" && several);
    if (visible) CHECK(policy_of(b.data) == (expected ? kInterleave : kDefault));
    std::memset(b.data, 1, kBytes);
  }
  std::printf("memory policies: %s\n", visible ? "checked" : "not visible here");
  BackendOptions wrong;
  wrong.numa = "some";
  CHECK_THROWS(make_cpu_backend(wrong), "numa: 'auto', 'off' or 'interleave' expected, found 'some'");
  CHECK(describe_numa().find("node") != std::string::npos);
}

}  // namespace

int main() {
  test_lists();
  test_cores();
  test_nodes();
  test_quota();
  test_affinity();
  test_policies();
  return test::report("test_topology");
}
