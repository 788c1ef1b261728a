#include "core/file_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace dflash {

FileReader::FileReader(const std::string& path, bool direct) : path_(path) {
  open(direct);
  struct stat st{};
  if (::fstat(fd_, &st) != 0 || !S_ISREG(st.st_mode)) {
    ::close(fd_);
    fail(path_, ": expected a file, found something else (a folder?)");
  }
  size_ = static_cast<uint64_t>(st.st_size);
}

FileReader::~FileReader() {
  if (fd_ >= 0) ::close(fd_);
}

void FileReader::open(bool direct) {
  if (fd_ >= 0) ::close(fd_);
  direct_ = false;
#if defined(O_DIRECT)
  if (direct) {
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = fd_ >= 0;
    if (direct_) return;
  }
#endif
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) fail(path_, ": cannot open: ", std::strerror(errno));
#if defined(POSIX_FADV_SEQUENTIAL)
  (void)::posix_fadvise(fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
}

const char* FileReader::read(uint64_t offset, size_t bytes, void* buffer) {
  if (offset > size_ || bytes > size_ - offset) {
    fail(path_, ": bytes ", offset, " to ", offset + bytes, " expected, but the file has ", size_);
  }
  const uint64_t begin = offset / kAlign * kAlign;
  const size_t skip = static_cast<size_t>(offset - begin), wanted = skip + bytes;
  char* to = static_cast<char*>(buffer);
  const size_t blocks = (wanted + kAlign - 1) / kAlign * kAlign;  // direct reads are of whole blocks
  for (size_t done = 0; done < wanted;) {
    const ssize_t got = ::pread(fd_, to + done, blocks - done, static_cast<off_t>(begin + done));
    if (got > 0) {
      done += static_cast<size_t>(got);
      if (direct_ && done < wanted && done % kAlign != 0) open(false);  // no block begins here
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && direct_) {  // the file opened so, but does not read so
      open(false);
      continue;
    }
    if (got < 0) fail(path_, ": cannot read ", bytes, " bytes at ", offset, ": ", std::strerror(errno));
    fail(path_, ": ends at ", begin + done, " while bytes up to ", offset + bytes, " are read; was it cut meanwhile?");
  }
#if defined(POSIX_FADV_DONTNEED)
  if (!direct_) (void)::posix_fadvise(fd_, static_cast<off_t>(begin), static_cast<off_t>(wanted), POSIX_FADV_DONTNEED);
#endif
  return to + skip;
}

}  // namespace dflash
