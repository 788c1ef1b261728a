#pragma once
// Reads a file in large pieces without leaving it in the page cache: O_DIRECT where the file system takes it, else
// buffered with the pages dropped behind. On unified memory a model read through the cache would be resident twice.

#include <cstddef>
#include <cstdint>
#include <string>

namespace dflash {

class FileReader {
 public:
  static constexpr size_t kAlign = 4096;  // of buffers, and of offsets and lengths of direct reads

  // Throws Error naming the path. direct = false never tries O_DIRECT.
  explicit FileReader(const std::string& path, bool direct = true);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  bool direct() const { return direct_; }  // false once a direct read was refused

  // A buffer this large holds any `bytes` of the file.
  static constexpr size_t buffer_bytes(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign + kAlign; }

  // Bytes [offset, offset + bytes) of the file; returns where in buffer they begin. buffer: aligned to kAlign, of
  // buffer_bytes(bytes). Throws Error naming path and range when the file ends before or cannot be read.
  const char* read(uint64_t offset, size_t bytes, void* buffer);

 private:
  void open(bool direct);

  std::string path_;
  uint64_t size_ = 0;
  int fd_ = -1;
  bool direct_ = false;
};

}  // namespace dflash
