#pragma once
// The share of a file's pages that are in the page cache; -1 where the system does not say.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace dflash::test {

inline double cached_share(const std::string& path, size_t bytes) {
  const int fd = ::open(path.c_str(), O_RDONLY);
  void* p = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  ::close(fd);
  std::vector<unsigned char> pages((bytes + 4095) / 4096);
  const bool known = p != MAP_FAILED && ::mincore(p, bytes, pages.data()) == 0;
  if (p != MAP_FAILED) ::munmap(p, bytes);
  if (!known) return -1.0;
  size_t in = 0;
  for (const unsigned char page : pages) in += page & 1;
  return static_cast<double>(in) / static_cast<double>(pages.size());
}

}  // namespace dflash::test
