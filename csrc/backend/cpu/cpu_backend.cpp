#include "backend/cpu/cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>

#include "backend/cpu/isa.h"
#include "core/error.h"
#include "core/topology.h"
#include "quant/blocks.h"

namespace dflash::cpu {
namespace {

constexpr size_t kMapFrom = 4 << 20;  // larger buffers come from mmap
constexpr size_t kArena = 32 << 20;   // smaller weights share huge pages of this much address space

// Reproducible noise: splitmix64.
struct Noise {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
};

// One row of random weights, about uniform with standard deviation n^-0.5.
void random_row(DType type, int64_t n, Noise noise, uint8_t* row) {
  const float bound = std::sqrt(3.0f / static_cast<float>(n));
  const auto put16 = [](uint8_t* p, uint16_t h) { std::memcpy(p, &h, 2); };
  const auto put_bytes = [&](uint8_t* p, int count) {
    for (int i = 0; i < count; i += 8) {
      const uint64_t bits = noise.next();
      std::memcpy(p + i, &bits, 8);
    }
  };
  if (is_quantized(type)) {
    const float levels = type == DType::Q8_0 ? 127.0f : 7.5f;
    const size_t bytes = row_bytes(type, 32);
    for (int64_t g = 0; g < n / 32; ++g, row += bytes) {
      // Either sign: quants are not centred (-8..7), and a common mean would drown all differences within a few layers.
      const float sign = noise.uniform() < 0.5f ? -1.0f : 1.0f;
      const float d = sign * bound / levels * (0.75f + 0.5f * noise.uniform());
      put16(row, f32_to_f16(d));
      if (type == DType::Q4_1) put16(row + 2, f32_to_f16(-d * (7.0f + noise.uniform())));
      const int header = type == DType::Q4_1 ? 4 : 2;
      put_bytes(row + header, static_cast<int>(bytes) - header);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float x = bound * (2.0f * noise.uniform() - 1.0f);
    if (type == DType::F32) std::memcpy(row + 4 * i, &x, 4);
    if (type == DType::F16) put16(row + 2 * i, f32_to_f16(x));
    if (type == DType::BF16) put16(row + 2 * i, f32_to_bf16(x));
  }
}

// kernels.h: 16 rows interleaved 16 elements at a time.
void pack_float_panel(const uint8_t* rows, int n_rows, size_t row, size_t element, uint8_t* panel) {
  const size_t block = 16 * element;
  for (size_t at = 0; at < row; at += block) {
    for (int i = 0; i < kPanel; ++i, panel += block) {
      const size_t have = i < n_rows ? std::min(block, row - at) : 0;
      if (have > 0) std::memcpy(panel, rows + row * static_cast<size_t>(i) + at, have);
      if (have < block) std::memset(panel + have, 0, block - have);
    }
  }
}

// One row of a panel in its GGUF form.
void unpack_row(const Weight& w, int lane, const uint8_t* panel, uint8_t* row) {
  const size_t bytes = row_bytes(w.type, w.n_in), at = static_cast<size_t>(lane);
  if (!is_quantized(w.type)) {
    const size_t block = 16 * static_cast<size_t>(dtype_info(w.type).bytes);
    for (size_t b = 0; b < bytes; b += block) {
      std::memcpy(row + b, panel + kPanel * b + at * block, std::min(block, bytes - b));
    }
    return;
  }
  const size_t block = row_bytes(w.type, 32), header = w.type == DType::Q4_1 ? 4 : 2;
  for (const uint8_t* end = row + bytes; row < end; row += block, panel += kPanel * block) {
    for (size_t h = 0; h < header; h += 2) std::memcpy(row + h, panel + kPanel * h + 2 * at, 2);
    for (size_t i = 0; i < block - header; ++i) {
      const uint8_t byte = panel[kPanel * header + 64 * (i / 4) + 4 * at + i % 4];
      row[header + i] = w.type == DType::Q8_0 ? byte ^ 0x80 : byte;
    }
  }
}

// Advice on the whole pages inside a range of a file mapping. Refusals do not matter.
void advise(const uint8_t* p, size_t bytes, int advice) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

// What Linux says can be had without paging; where it says nothing, all there is.
size_t mem_available(size_t total) {
  std::ifstream in("/proc/meminfo");
  for (std::string key; in >> key;) {
    size_t kb = 0;
    if (key == "MemAvailable:" && in >> kb) return kb << 10;
  }
  return total;
}

// Every thread reads all of the weights in turn, so the nodes serve them best together: no node's memory is the
// bottleneck, whichever thread takes which part.
std::vector<int> interleaved_nodes(const std::string& numa) {
  if (numa == "off") return {};
  const std::vector<int> nodes = numa_nodes(allowed_cpus());
  if (numa == "interleave") return nodes;
  if (numa == "auto") return nodes.size() > 1 ? nodes : std::vector<int>();
  fail("numa: 'auto', 'off' or 'interleave' expected, found '", numa, "'");
}

}  // namespace

CpuBackend::CpuBackend(const BackendOptions& options)
    : pool_(options.n_threads),
      k_(select_kernels(options.cpu_isa)),
      precise_(options.precise),
      repack_(options.repack && !options.precise),
      nodes_(interleaved_nodes(options.numa)),
      thread_(static_cast<size_t>(pool_.size())) {}

std::string CpuBackend::describe() const {
  return cat("cpu ", k_.name, ", ", pool_.size(), pool_.size() == 1 ? " thread, " : " threads, ",
             precise_ ? "f32 activations" : "int8 activations");
}

MemoryInfo CpuBackend::memory() const {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  MemoryInfo info;
  info.total = pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : 0;
  info.free = mem_available(info.total);
  if (repack_)
    info.hint = "repack=False (weights stay in the file's mapping: what does not fit is read again, not swapped)";
  return info;
}

Buffer CpuBackend::alloc(size_t bytes) {
  Buffer b;
  b.bytes = bytes;
  if (bytes >= kMapFrom) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED) {
      if (!nodes_.empty()) (void)interleave(p, bytes, nodes_);  // refused: as good as one node gets (doctor says it)
      b.data = p;
      b.owner = std::shared_ptr<void>(p, [bytes](void* q) { munmap(q, bytes); });
    }
  } else {
    b.data = std::aligned_alloc(64, (std::max<size_t>(bytes, 1) + 63) / 64 * 64);
    b.owner = std::shared_ptr<void>(b.data, std::free);
  }
  if (!b.data) throw CapacityError(cat("out of memory: could not allocate ", bytes, " bytes"));
  return b;
}

// Weights get huge pages: fewer TLB misses when streamed. Other buffers do not: they are read from caches or far less
// often, and the first token would clear 2 MB wherever it touches them.
Buffer CpuBackend::alloc_huge(size_t bytes) {
  Buffer b = alloc(bytes);
#if defined(MADV_HUGEPAGE)
  madvise(b.data, bytes, MADV_HUGEPAGE);
#endif
  return b;
}

Buffer CpuBackend::alloc_weight(size_t bytes) {
  if (bytes >= kMapFrom) return alloc_huge(bytes);
  const size_t padded = (bytes + 63) / 64 * 64;
  if (!arena_.data || arena_used_ + padded > arena_.bytes) {
    arena_ = alloc_huge(kArena);  // pages that stay untouched cost nothing; the weights in it keep the last one alive
    arena_used_ = 0;
  }
  Buffer b;
  b.data = arena_.as<uint8_t>() + arena_used_;
  b.bytes = bytes;
  b.owner = arena_.owner;
  arena_used_ += padded;
  return b;
}

void CpuBackend::upload(void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }
void CpuBackend::download(void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }

Weight CpuBackend::load(const HostTensor& t, std::shared_ptr<const void> keep_alive) {
  const DTypeInfo& info = dtype_info(t.type);
  if (t.n_in <= 0 || t.n_out <= 0 || t.n_expert <= 0 || t.n_in % info.block != 0) {
    fail("tensor '", t.name, "': shape [", t.n_in, ", ", t.n_out, ", ", t.n_expert, "] does not suit type ", info.name,
         " (row length must be a positive multiple of ", info.block, ")");
  }
  Weight w;
  w.type = t.type;
  w.n_in = t.n_in;
  w.n_out = t.n_out;
  w.n_expert = t.n_expert;
  w.data = t.data;
  w.owner = std::move(keep_alive);
  if (t.bytes != w.bytes() || !t.data) {
    fail("tensor '", t.name, "': expected ", w.bytes(), " bytes of ", info.name, ", found ", t.data ? t.bytes : 0);
  }
  if (!repacks(t)) return w;

  const int64_t panels = panels_of(t.n_out);
  const size_t panel = panel_bytes(w), row = row_bytes(t.type, t.n_in);
  const Buffer packed = alloc_weight(panel * static_cast<size_t>(panels * t.n_expert));
  const uint8_t* rows = static_cast<const uint8_t*>(t.data);
  // Pieces of a few megabytes: read ahead of the one at hand, and let the mapping's pages behind it go, so that memory
  // is not held twice.
  const int64_t total = panels * t.n_expert, piece = std::max<int64_t>(1, static_cast<int64_t>((8 << 20) / panel));
  const auto source = [&](int64_t p) {
    return rows + row * static_cast<size_t>(p / panels * t.n_out + p % panels * kPanel);
  };
  pool_.parallel_for((total + piece - 1) / piece, [&](int64_t i, int) {
    const int64_t begin = i * piece, end = std::min(total, begin + piece), next = std::min(total, end + piece);
    if (t.file_mapping) {
      advise(source(end), static_cast<size_t>(source(next) - source(end)), MADV_WILLNEED);
#if defined(MADV_POPULATE_READ)
      advise(source(begin), static_cast<size_t>(source(end) - source(begin)), MADV_POPULATE_READ);
#endif
    }
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p % panels * kPanel;
      const int n_rows = static_cast<int>(std::min<int64_t>(kPanel, t.n_out - first));
      const uint8_t* from = source(p);
      uint8_t* to = packed.as<uint8_t>() + panel * static_cast<size_t>(p);
      if (is_quantized(t.type)) {
        k_.pack_panel(t.type, from, n_rows, t.n_in / 32, to);
      } else {
        pack_float_panel(from, n_rows, row, static_cast<size_t>(info.bytes), to);
      }
    }
    if (t.file_mapping) advise(source(begin), static_cast<size_t>(source(end) - source(begin)), MADV_DONTNEED);
  });
  w.layout = kPanelLayout;
  w.data = packed.data;
  w.owner = packed.owner;
  return w;
}

size_t CpuBackend::weight_bytes(const HostTensor& t) const {
  if (!read_whole(t)) return 0;
  if (!repacks(t)) return t.bytes;  // page cache
  return panel_bytes(t.type, t.n_in) * static_cast<size_t>(panels_of(t.n_out) * t.n_expert);
}

Weight CpuBackend::random_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert, uint64_t seed) {
  const size_t row = row_bytes(type, n_in);
  const int64_t rows = n_out * n_expert;
  HostTensor t{"random", type, n_in, n_out, n_expert, nullptr, row * static_cast<size_t>(rows)};
  const Buffer host = alloc(t.bytes);
  pool_.parallel_for(rows, [&](int64_t r, int) {
    Noise noise{seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(r)};
    noise.state = noise.next();
    random_row(type, n_in, noise, host.as<uint8_t>() + row * static_cast<size_t>(r));
  });
  t.data = host.data;
  return load(t, host.owner);
}

void CpuBackend::copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) {
  for (int r = 0; r < rows; ++r) std::memcpy(dst + r * stride, src + r * n, static_cast<size_t>(n) * sizeof(float));
}

void CpuBackend::top1(const float* logits, int rows, int64_t n, Top1* out) {
  parallel(rows, static_cast<size_t>(rows * n) * 4,
           [&](int64_t r, int) { k_.top1(logits + r * n, n, &out[r].id, &out[r].prob, &out[r].margin); });
}

int CpuBackend::sample(const Sampling& s, float* logits, int64_t n, int32_t* out) {
  const int rows = s.rows();
  for (int r = 0; r < rows; ++r) {
    sampler_.edit(s, r, logits + r * n, n);
    out[r] = sampler_.draw(s, r);
    if (!s.all_rows && r + 1 < rows && out[r] != s.drafts[static_cast<size_t>(r)]) return r + 1;
  }
  return rows;
}

void CpuBackend::embed(const Weight& table, const int32_t* tokens, int rows, float* x) {
  const size_t row = row_bytes(table.type, table.n_in);
  const uint8_t* data = static_cast<const uint8_t*>(table.data);
  std::vector<uint8_t> unpacked(table.layout == kPanelLayout ? row : 0);
  for (int r = 0; r < rows; ++r) {
    const uint8_t* source = data + row * static_cast<size_t>(tokens[r]);
    if (table.layout == kPanelLayout) {
      unpack_row(table, tokens[r] % kPanel, data + panel_bytes(table) * static_cast<size_t>(tokens[r] / kPanel),
                 unpacked.data());
      source = unpacked.data();
    }
    decode_row(table.type, source, table.n_in, x + r * table.n_in);
  }
}

Backend::ExpertCount CpuBackend::take_expert_count() {
  const ExpertCount taken = count_;
  count_ = {};
  return taken;
}

}  // namespace dflash::cpu

namespace dflash {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace dflash
