#pragma once
// What a user did wrong, said once: the name, what was expected, what was found, and a way out.

#include <sstream>
#include <stdexcept>
#include <string>

namespace dflash {

// Wrong input: a file, an option, a token. Becomes dflash_cpp.DFlashError (a ValueError) in Python.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The request does not fit: context full, memory short. Becomes dflash_cpp.CapacityError.
class CapacityError : public Error {
 public:
  using Error::Error;
};

template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(cat(parts...));
}

}  // namespace dflash
