#include "code_object.h"

#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace rdna {
namespace {

// What is used of MessagePack, as the metadata note has it.
struct Node {
  std::map<std::string, Node> map;
  std::vector<Node> array;
  std::string text;
  uint64_t number = 0;

  const Node& at(const char* key) const {
    const auto n = map.find(key);
    if (n == map.end()) fault("code object: no ", key, " in its metadata");
    return n->second;
  }
};

class Reader {
 public:
  Reader(const uint8_t* p, size_t n) : p_(p), end_(p + n) {}
  Node read() {
    const uint8_t tag = static_cast<uint8_t>(take(1));
    Node n;
    if (tag < 0x80) {
      n.number = tag;
    } else if (tag < 0x90) {
      read_map(n, tag & 15);
    } else if (tag < 0xa0) {
      read_array(n, tag & 15);
    } else if (tag < 0xc0) {
      n.text = string(tag & 31);
    } else if (tag == 0xc0 || tag == 0xc2 || tag == 0xc3) {
      n.number = tag == 0xc3;
    } else if (tag >= 0xcc && tag <= 0xcf) {
      n.number = take(1 << (tag - 0xcc));
    } else if (tag >= 0xd0 && tag <= 0xd3) {
      n.number = take(1 << (tag - 0xd0));
    } else if (tag >= 0xd9 && tag <= 0xdb) {
      n.text = string(take(1 << (tag - 0xd9)));
    } else if (tag == 0xdc || tag == 0xdd) {
      read_array(n, take(tag == 0xdc ? 2 : 4));
    } else if (tag == 0xde || tag == 0xdf) {
      read_map(n, take(tag == 0xde ? 2 : 4));
    } else {
      fault("code object: metadata with tag ", std::to_string(tag));
    }
    return n;
  }

 private:
  uint64_t take(int bytes) {  // big endian
    if (end_ - p_ < bytes) fault("code object: metadata ends early");
    uint64_t v = 0;
    while (bytes-- > 0) v = v << 8 | *p_++;
    return v;
  }
  std::string string(uint64_t n) {
    if (static_cast<uint64_t>(end_ - p_) < n) fault("code object: metadata ends early");
    std::string s(reinterpret_cast<const char*>(p_), n);
    p_ += n;
    return s;
  }
  void read_map(Node& n, uint64_t count) {
    while (count-- > 0) {
      const std::string key = read().text;
      n.map[key] = read();
    }
  }
  void read_array(Node& n, uint64_t count) {
    while (count-- > 0) n.array.push_back(read());
  }
  const uint8_t* p_;
  const uint8_t* end_;
};

template <typename T>
T get(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

CodeObject::CodeObject(const uint8_t* elf, size_t bytes) : file_(elf, elf + bytes) {
  const auto header = get<Elf64_Ehdr>(elf);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) fault("code object: not an ELF file");
  const auto program = [&](int i) {
    return get<Elf64_Phdr>(elf + header.e_phoff + static_cast<size_t>(i) * sizeof(Elf64_Phdr));
  };
  uint64_t size = 0;
  for (int i = 0; i < header.e_phnum; i++) {
    if (program(i).p_type == PT_LOAD) size = std::max(size, program(i).p_vaddr + program(i).p_memsz);
  }
  image_.assign(size, 0);
  for (int i = 0; i < header.e_phnum; i++) {
    const Elf64_Phdr p = program(i);
    if (p.p_type == PT_LOAD) std::memcpy(image_.data() + p.p_vaddr, elf + p.p_offset, p.p_filesz);
    if (p.p_type == PT_NOTE) read_notes(elf + p.p_offset, p.p_filesz);
  }
  std::map<std::string, uint64_t> symbols;
  for (int i = 0; i < header.e_shnum; i++) {
    const auto section = [&](size_t k) { return get<Elf64_Shdr>(elf + header.e_shoff + k * sizeof(Elf64_Shdr)); };
    const Elf64_Shdr s = section(static_cast<size_t>(i));
    if (s.sh_type == SHT_RELA && s.sh_size > 0) fault("code object: relocations are not modelled");
    if (s.sh_type != SHT_SYMTAB && s.sh_type != SHT_DYNSYM) continue;
    const char* names = reinterpret_cast<const char*>(elf + section(s.sh_link).sh_offset);
    for (uint64_t k = 0; k < s.sh_size; k += sizeof(Elf64_Sym)) {
      const auto symbol = get<Elf64_Sym>(elf + s.sh_offset + k);
      symbols[names + symbol.st_name] = symbol.st_value;
    }
  }
  for (auto& k : kernels_) {
    const auto d = symbols.find(k->name + ".kd");
    if (d == symbols.end()) fault("code object: no descriptor of ", k->name);
    const uint8_t* p = image_.data() + d->second;  // the 64 bytes of a kernel descriptor
    k->descriptor = d->second;
    k->lds = get<uint32_t>(p);
    k->scratch = get<uint32_t>(p + 4);
    k->argument_bytes = get<uint32_t>(p + 8);
    k->entry = d->second + static_cast<uint64_t>(get<int64_t>(p + 16));
    k->rsrc1 = get<uint32_t>(p + 48);
    k->rsrc2 = get<uint32_t>(p + 52);
    k->properties = get<uint16_t>(p + 56);
    k->image = reinterpret_cast<uint64_t>(image_.data());
  }
}

Region CodeObject::region() const {
  const auto begin = reinterpret_cast<uint64_t>(image_.data());
  return {begin, begin + image_.size(), false};
}

void CodeObject::read_notes(const uint8_t* p, size_t bytes) {
  for (size_t at = 0; at + sizeof(Elf64_Nhdr) <= bytes;) {
    const auto note = get<Elf64_Nhdr>(p + at);
    const size_t content = at + sizeof note + (note.n_namesz + 3) / 4 * 4;
    if (note.n_type == 32) {  // NT_AMDGPU_METADATA
      const Node root = Reader(p + content, note.n_descsz).read();
      for (const Node& n : root.at("amdhsa.kernels").array) {
        auto k = std::make_unique<Kernel>();
        k->name = n.at(".name").text;
        k->vgprs = static_cast<uint32_t>(n.at(".vgpr_count").number);
        k->max_threads = static_cast<uint32_t>(n.at(".max_flat_workgroup_size").number);
        if (n.map.count(".args") > 0) {
          for (const Node& a : n.at(".args").array) {
            k->arguments.push_back({static_cast<uint32_t>(a.at(".offset").number),
                                    static_cast<uint32_t>(a.at(".size").number), a.at(".value_kind").text});
          }
        }
        kernels_.push_back(std::move(k));
      }
    }
    at = content + (note.n_descsz + 3) / 4 * 4;
  }
}

std::string CodeObject::disassemble(const Kernel& kernel) {
  if (path_.empty()) {
    const int file = memfd_create("code object", 0);  // the disassembler inherits it
    if (file < 0 || write(file, file_.data(), file_.size()) != static_cast<ssize_t>(file_.size())) {
      fault("no memory for a copy of the code object");
    }
    path_ = "/proc/self/fd/" + std::to_string(file);
  }
  const std::string command = RDNA_OBJDUMP " -d --disassemble-symbols=" + kernel.name + " " + path_;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) fault("cannot run ", command);
  std::string text;
  char buffer[1 << 16];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
  if (pclose(pipe) != 0) fault("failed: ", command);
  return text;
}

uint32_t Kernel::index_of(uint64_t address) const {
  const auto at = std::find_if(code.begin(), code.end(), [&](const Instruction& in) { return in.address == address; });
  if (at == code.end()) fault("no instruction at ", hex(address));
  return static_cast<uint32_t>(at - code.begin());
}

std::unique_ptr<CodeObject> open_bundle(const void* wrapper, const char* target) {
  const auto* bundle = get<const uint8_t*>(static_cast<const uint8_t*>(wrapper) + 8);
  static constexpr char kMagic[] = "__CLANG_OFFLOAD_BUNDLE__";
  if (std::memcmp(bundle, kMagic, sizeof kMagic - 1) != 0) fault("fat binary: not an offload bundle");
  const uint8_t* p = bundle + sizeof kMagic - 1;
  const auto entries = get<uint64_t>(p);
  p += 8;
  for (uint64_t i = 0; i < entries; i++) {
    const auto offset = get<uint64_t>(p), size = get<uint64_t>(p + 8), length = get<uint64_t>(p + 16);
    const std::string id(reinterpret_cast<const char*>(p + 24), length);
    p += 24 + length;
    if (id.size() > std::strlen(target) &&
        id.compare(id.size() - std::strlen(target), std::string::npos, target) == 0) {
      return std::make_unique<CodeObject>(bundle + offset, size);
    }
  }
  return nullptr;
}

}  // namespace rdna
