// What kernels executed, as tables.

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "interpreter.h"

namespace rdna {
namespace {

struct Column {
  const char* name;
  std::vector<Class> classes;
};

const std::vector<Column>& columns() {
  static const std::vector<Column> c = {
      {"VALU", {Class::kValu}},         {"dual", {Class::kDual}},
      {"packed", {Class::kPacked}},     {"trans", {Class::kTranscendental}},
      {"f64", {Class::kDouble}},        {"dot", {Class::kDot}},
      {"WMMA", {Class::kWmma}},         {"lane", {Class::kLane}},
      {"LDS", {Class::kLds}},           {"loads", {Class::kLoad}},
      {"stores", {Class::kStore}},      {"atomics", {Class::kAtomic}},
      {"s_load", {Class::kScalarLoad}}, {"SALU", {Class::kSalu}},
      {"branch", {Class::kBranch}},     {"wait", {Class::kWait}},
      {"barrier", {Class::kBarrier}},
  };
  return c;
}

uint64_t bytes_of(const Instruction& in) {  // a lane
  if (in.text.find("_u8") != std::string::npos || in.text.find("_i8") != std::string::npos ||
      in.text.find("_b8") != std::string::npos)
    return 1;
  if (in.text.find("_u16") != std::string::npos || in.text.find("_i16") != std::string::npos ||
      in.text.find("b16 ") != std::string::npos)
    return 2;
  return 4u * (in.klass == Class::kLoad ? in.dst.count : in.src[1].count);
}

std::string human(double v) {
  char text[32];
  const char* unit = "";
  for (const char* next : {"k", "M", "G"}) {
    if (v < 10000) break;
    v /= 1000;
    unit = next;
  }
  std::snprintf(text, sizeof text, v < 100 && *unit ? "%.1f%s" : "%.0f%s", v, unit);
  return text;
}

}  // namespace

std::string readable_name(const std::string& mangled) {
  int status = 0;
  char* name = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string s = status == 0 ? name : mangled;
  std::free(name);
  for (const char* drop : {"(anonymous namespace)::", "dflash::", "hip::", "void ", "(DType)"}) {
    for (size_t at; (at = s.find(drop)) != std::string::npos;) s.erase(at, std::string(drop).size());
  }
  return s.substr(0, s.find('('));
}

std::string counts_table(const std::vector<const Kernel*>& kernels) {
  std::string table = "| kernel | launches |";
  for (const Column& c : columns()) table.append(" ").append(c.name).append(" |");
  table += " bytes loaded, all lanes | bytes stored | misaligned |\n|---|";
  for (size_t i = 0; i < columns().size() + 4; i++) table += "---|";
  table += "\n";
  for (const Kernel* k : kernels) {
    if (k->launches == 0) continue;
    std::vector<uint64_t> sums(static_cast<size_t>(Class::kCount), 0);
    uint64_t in_bytes = 0, out_bytes = 0, misaligned = 0;
    for (size_t i = 0; i < k->times.size(); i++) {
      const Instruction& in = k->code[i];
      sums[static_cast<size_t>(in.klass)] += k->times[i];
      misaligned += k->misaligned[i];
      if (in.klass == Class::kLoad) in_bytes += k->lanes[i] * bytes_of(in);
      if (in.klass == Class::kStore) out_bytes += k->lanes[i] * bytes_of(in);
    }
    const auto cell = [&table](const std::string& text) { table.append(" ").append(text).append(" |"); };
    table.append("|");
    cell(readable_name(k->name));
    cell(std::to_string(k->launches));
    for (const Column& c : columns()) {
      uint64_t n = 0;
      for (Class klass : c.classes) n += sums[static_cast<size_t>(klass)];
      cell(human(static_cast<double>(n)));
    }
    for (uint64_t n : {in_bytes, out_bytes, misaligned}) cell(human(static_cast<double>(n)));
    table.append("\n");
  }
  return table;
}

std::string profile(const Kernel& kernel) {
  std::string text = readable_name(kernel.name) + ", " + std::to_string(kernel.launches) + " launches\n";
  for (size_t i = 0; i < kernel.times.size(); i++) {
    if (kernel.code[i].address == 0) break;  // second halves of dual instructions follow
    char line[64];
    std::snprintf(line, sizeof line, "%12llu  %06llx  ", static_cast<unsigned long long>(kernel.times[i]),
                  static_cast<unsigned long long>(kernel.code[i].address));
    text += line + kernel.code[i].text + "\n";
  }
  return text;
}

}  // namespace rdna
