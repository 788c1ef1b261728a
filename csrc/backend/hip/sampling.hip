// One token from each row of logits, exactly as backend/cpu/row_sampler.cpp draws it, without sorting a row.
//
// top_k, top_p and the draw are one question each: walking the tokens in a fixed order (by logit where tokens are cut,
// else by id), which one makes a running sum pass a threshold? The row is binned along that order once, with the count
// and the mass of each bin; the bin where the sum passes is known from these, and its few tokens are sorted.
//
// A token's mass is exp((logit - top) / T) as a 44-bit fraction in an integer. Integer sums have no order, so bins are
// filled by atomics and the result is the same bits every time, for any number of rows. What rounding takes from a
// token is below 2^-45 of the most probable one.

#include "backend/hip/sampling.h"

#include <cmath>
#include <cstring>

namespace dflash::hip {

namespace {

constexpr int kParts = 64;         // blocks that share a row
constexpr int kPartThreads = 256;  // of such a block
constexpr int kBins = 2048;        // of a row
constexpr int kList = 1024;        // tokens that are sorted at once; threads of the last block
constexpr int kWaves = kList / gpu::kWave;
constexpr int kBinsPerUnit = 64;  // bins to a factor of e in probability (of a logit for T > 1)

using u64 = unsigned long long;

struct SampleArgs {
  const float* logits;  // [rows, n]
  int64_t n;
  double temperature;
  float floor_below_top;  // min_p keeps logits >= top + this; -inf: all
  float bins_per_logit;
  bool by_logit;  // the order: largest logit first, lowest id on ties; else by id
  int ids_per_bin;
  int top_k;
  double top_p;
  const u64* draws;  // [rows] 53 random bits
  float* parts;      // [rows, kParts] largest logits
  u64* mass;         // [rows, kBins]
  unsigned* count;   // [rows, kBins]
};

__device__ inline u64 max_u64(u64 a, u64 b) { return a > b ? a : b; }

// The largest of the row's parts, in every thread.
__device__ inline float top_of(const float* parts) {
  return gpu::wave_max(fmaxf(parts[gpu::lane()], parts[gpu::lane() + gpu::kWave]));
}

// The part of a token's place in the order that bins resolve.
__device__ inline int bin_of(const SampleArgs& a, float top, float logit, int id) {
  if (!a.by_logit) return id / a.ids_per_bin;
  return static_cast<int>(fminf((top - logit) * a.bins_per_logit, static_cast<float>(kBins - 1)));
}

// The whole place: smaller comes first. The id is in the low half either way.
__device__ inline u64 place_of(const SampleArgs& a, float logit, int id) {
  if (!a.by_logit) return static_cast<u64>(id);
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are one place
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(~ascending) << 32 | static_cast<uint32_t>(id);
}

__device__ inline u64 mass_of(const SampleArgs& a, float top, float logit) {
  return static_cast<u64>(exp((static_cast<double>(logit) - static_cast<double>(top)) / a.temperature) * 0x1p44 + 0.5);
}

__device__ inline bool is_candidate(const SampleArgs& a, float top, float logit) {
  return logit >= top + a.floor_below_top && logit > -INFINITY;
}

// ---- bias and penalties

struct EditArgs {
  float* logits;
  int64_t n;
  const TokenEdit* edits;
  int n_edits;
  const int32_t* drafts;   // [rows - 1]
  const int32_t* leaving;  // [rows - 1], or null
  float repetition, presence, frequency;
};

__global__ void __launch_bounds__(kPartThreads) edit_logits_kernel(EditArgs a) {
  gpu::wait_for_previous();
  const int i = static_cast<int>(blockIdx.x) * kPartThreads + static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  if (i >= a.n_edits) return;
  const TokenEdit e = a.edits[i];
  int count = e.count;
  if (a.leaving != nullptr) {
    for (int d = 0; d < row; ++d) count += (a.drafts[d] == e.id ? 1 : 0) - (a.leaving[d] == e.id ? 1 : 0);
  }
  float logit = a.logits[row * a.n + e.id] + e.bias;
  if (count != 0) {
    logit = logit > 0.0f ? logit / a.repetition : logit * a.repetition;
    logit -= a.presence + a.frequency * static_cast<float>(count);
  }
  a.logits[row * a.n + e.id] = logit;
}

// ---- bins

// The largest logit of each part; the row's bins to zero.
__global__ void __launch_bounds__(kPartThreads) row_top_kernel(SampleArgs a) {
  __shared__ float lds[kPartThreads / gpu::kWave];
  gpu::wait_for_previous();
  const int64_t row = blockIdx.y;
  const float* logits = a.logits + row * a.n;
  const int at = static_cast<int>(blockIdx.x) * kPartThreads + static_cast<int>(threadIdx.x);
  if (at < kBins) {
    a.mass[row * kBins + at] = 0;
    a.count[row * kBins + at] = 0;
  }
  float top = -INFINITY;
  for (int64_t i = at; i < a.n; i += kParts * kPartThreads) top = fmaxf(top, logits[i]);
  top = gpu::wave_max(top);
  if (gpu::lane() == 0) lds[gpu::wave()] = top;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kPartThreads / gpu::kWave; ++w) top = fmaxf(top, lds[w]);
  a.parts[row * kParts + blockIdx.x] = top;
}

__global__ void __launch_bounds__(kPartThreads) bin_by_logit_kernel(SampleArgs a) {
  __shared__ u64 mass[kBins];
  __shared__ unsigned count[kBins];
  gpu::wait_for_previous();
  const int64_t row = blockIdx.y;
  const float* logits = a.logits + row * a.n;
  const float top = top_of(a.parts + row * kParts);
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kPartThreads) {
    mass[b] = 0;
    count[b] = 0;
  }
  __syncthreads();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x; i < a.n; i += kParts * kPartThreads) {
    const float logit = logits[i];
    if (!is_candidate(a, top, logit)) continue;
    const int b = bin_of(a, top, logit, static_cast<int>(i));
    const u64 m = mass_of(a, top, logit);
    atomicAdd(&count[b], 1u);
    if (m != 0) atomicAdd(&mass[b], m);
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kPartThreads) {
    if (count[b] == 0) continue;
    atomicAdd(&a.count[row * kBins + b], count[b]);
    atomicAdd(&a.mass[row * kBins + b], mass[b]);
  }
}

__device__ inline u64 wave_sum(u64 v) {
  return gpu::reduce(v, [](u64 a, u64 b) { return a + b; });
}

// A wave sums a bin of consecutive ids.
__global__ void __launch_bounds__(kPartThreads) bin_by_id_kernel(SampleArgs a) {
  gpu::wait_for_previous();
  const int64_t row = blockIdx.y;
  const float* logits = a.logits + row * a.n;
  const float top = top_of(a.parts + row * kParts);
  for (int b = static_cast<int>(blockIdx.x) * (kPartThreads / gpu::kWave) + gpu::wave(); b < kBins;
       b += kParts * kPartThreads / gpu::kWave) {
    const int64_t first = static_cast<int64_t>(b) * a.ids_per_bin;
    const int64_t end = first + a.ids_per_bin < a.n ? first + a.ids_per_bin : a.n;
    u64 mass = 0;
    int count = 0;
    for (int64_t i = first + gpu::lane(); i < end; i += gpu::kWave) {
      if (!is_candidate(a, top, logits[i])) continue;
      mass += mass_of(a, top, logits[i]);
      ++count;
    }
    mass = wave_sum(mass);
    count = gpu::wave_sum(count);
    if (gpu::lane() == 0) {
      a.mass[row * kBins + b] = mass;
      a.count[row * kBins + b] = static_cast<unsigned>(count);
    }
  }
}

// ---- the draw

struct Shared {
  union {
    u64 list[kList];  // places of the tokens that are sorted
    struct {          // a finer binning, where one bin holds more than kList
      u64 mass[kBins];
      unsigned count[kBins];
    } bins;
  };
  u64 wave_totals[kWaves];
  u64 before, mass_before;  // the sums in front of what is looked at
  u64 low, high;            // places it lies between
  u64 through;              // the mass up to and with the token found
  unsigned members;
  int bin;
};

// The sum of v over the threads before this one.
__device__ u64 block_sum_before(u64 v, u64* wave_totals, u64* total) {
  u64 sum = v;
  for (int step = 1; step < gpu::kWave; step <<= 1) {
    const u64 other = gpu::shuffle(sum, gpu::lane() >= step ? gpu::lane() - step : gpu::lane());
    if (gpu::lane() >= step) sum += other;
  }
  __syncthreads();
  if (gpu::lane() == gpu::kWave - 1) wave_totals[gpu::wave()] = sum;
  __syncthreads();
  u64 before = 0, all = 0;
  for (int w = 0; w < kWaves; ++w) {
    if (w == gpu::wave()) before = all;
    all += wave_totals[w];
  }
  *total = all;
  return before + sum - v;
}

// Which of the bins holds the token at which count or mass passes threshold; the sums before it are added to the
// shared ones.
__device__ void find_bin(const u64* mass, const unsigned* count, bool by_count, u64 threshold, Shared& s) {
  constexpr int kEach = kBins / kList;
  const int first = static_cast<int>(threadIdx.x) * kEach;
  u64 m[kEach], measure[kEach], sum = 0, sum_mass = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    m[i] = mass[first + i];
    measure[i] = by_count ? count[first + i] : m[i];
    sum += measure[i];
    sum_mass += m[i];
  }
  u64 total;
  const u64 start = s.before, start_mass = s.mass_before;
  u64 before = start + block_sum_before(sum, s.wave_totals, &total);
  u64 mass_before = start_mass + block_sum_before(sum_mass, s.wave_totals, &total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before <= threshold && threshold < before + measure[i]) {  // true for one bin
      s.bin = first + i;
      s.members = count[first + i];
      s.before = before;
      s.mass_before = mass_before;
    }
    before += measure[i];
    mass_before += m[i];
  }
  __syncthreads();
}

// f(logit, place) for the candidates of the chosen bin whose places lie between low and high.
template <typename F>
__device__ void for_members(const SampleArgs& a, const float* logits, float top, int bin, u64 low, u64 high, F f) {
  int64_t i = threadIdx.x, end = a.n;
  if (!a.by_logit) {
    i += static_cast<int64_t>(bin) * a.ids_per_bin;
    end = static_cast<int64_t>(bin + 1) * a.ids_per_bin;
    end = end < a.n ? end : a.n;
  }
#pragma unroll 4
  for (; i < end; i += kList) {
    const float logit = logits[i];
    if (!is_candidate(a, top, logit) || bin_of(a, top, logit, static_cast<int>(i)) != bin) continue;
    const u64 place = place_of(a, logit, static_cast<int>(i));
    if (place >= low && place <= high) f(logit, place);
  }
}

// Walking the candidates in order: the id of the first with threshold < the count or mass up to and with it; the mass
// up to and with it in s.through. There is one.
__device__ int find(const SampleArgs& a, int64_t row, float top, bool by_count, u64 threshold, Shared& s) {
  const float* logits = a.logits + row * a.n;
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (t == 0) {
    s.before = s.mass_before = 0;
    s.low = 0;
    s.high = ~u64{0};
  }
  __syncthreads();
  find_bin(a.mass + row * kBins, a.count + row * kBins, by_count, threshold, s);
  const int bin = s.bin;

  while (s.members > kList) {  // many equal or nearly equal logits
    u64 least = ~u64{0}, most = 0;
    for_members(a, logits, top, bin, s.low, s.high, [&](float, u64 place) {
      least = place < least ? place : least;
      most = max_u64(most, place);
    });
    least = gpu::reduce(least, [](u64 a, u64 b) { return b < a ? b : a; });
    most = gpu::reduce(most, [](u64 a, u64 b) { return max_u64(a, b); });
    __syncthreads();
    if (t == 0) {
      s.low = ~u64{0};
      s.high = 0;
    }
    __syncthreads();
    if (gpu::lane() == 0) {
      atomicMin(&s.low, least);
      atomicMax(&s.high, most);
    }
    for (int b = t; b < kBins; b += kList) {
      s.bins.mass[b] = 0;
      s.bins.count[b] = 0;
    }
    __syncthreads();
    const u64 low = s.low, high = s.high;
    int shift = 0;
    while ((high - low) >> shift >= kBins) ++shift;
    for_members(a, logits, top, bin, low, high, [&](float logit, u64 place) {
      const int b = static_cast<int>((place - low) >> shift);
      atomicAdd(&s.bins.count[b], 1u);
      atomicAdd(&s.bins.mass[b], mass_of(a, top, logit));
    });
    __syncthreads();
    find_bin(s.bins.mass, s.bins.count, by_count, threshold, s);
    if (t == 0) {
      s.low = low + (static_cast<u64>(s.bin) << shift);
      const u64 last = s.low + ((u64{1} << shift) - 1);
      s.high = last < high ? last : high;
    }
    __syncthreads();
  }

  // Sort what is left, and walk it.
  const unsigned members = s.members;
  const u64 low = s.low, high = s.high;
  __syncthreads();
  s.list[t] = ~u64{0};
  if (t == 0) s.members = 0;
  __syncthreads();
  for_members(a, logits, top, bin, low, high, [&](float, u64 place) { s.list[atomicAdd(&s.members, 1u)] = place; });
  int size = 1;
  while (size < static_cast<int>(members)) size <<= 1;
  for (int run = 2; run <= size; run <<= 1) {
    for (int step = run >> 1; step > 0; step >>= 1) {
      __syncthreads();
      const int other = t ^ step;
      if (t < size && other > t) {
        const u64 x = s.list[t], y = s.list[other];
        if ((x > y) == ((t & run) == 0)) {
          s.list[t] = y;
          s.list[other] = x;
        }
      }
    }
  }
  __syncthreads();
  const bool is_member = t < static_cast<int>(members);
  const int id = is_member ? static_cast<int>(s.list[t] & 0xffffffffu) : 0;
  const u64 m = is_member ? mass_of(a, top, logits[id]) : 0;
  const u64 measure = by_count ? (is_member ? 1 : 0) : m;
  u64 total;
  const u64 start = s.before, start_mass = s.mass_before;
  const u64 before = start + block_sum_before(measure, s.wave_totals, &total);
  const u64 mass_before = start_mass + block_sum_before(m, s.wave_totals, &total);
  if (before <= threshold && threshold < before + measure) {  // true in one thread
    s.bin = id;
    s.through = mass_before + m;
  }
  __syncthreads();
  return s.bin;
}

__global__ void __launch_bounds__(kList) draw_token_kernel(SampleArgs a, int32_t* out) {
  __shared__ Shared s;
  gpu::wait_for_previous();
  const int64_t row = blockIdx.x;
  const float top = top_of(a.parts + row * kParts);
  if (!(top > -INFINITY)) {
    if (threadIdx.x == 0) out[row] = -1;
    return;
  }
  u64 count = 0, mass = 0, all_count, all_mass;
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kList) {
    count += a.count[row * kBins + b];
    mass += a.mass[row * kBins + b];
  }
  (void)block_sum_before(count, s.wave_totals, &all_count);
  (void)block_sum_before(mass, s.wave_totals, &all_mass);
  if (a.top_k > 0 && static_cast<u64>(a.top_k) < all_count) {
    (void)find(a, row, top, true, static_cast<u64>(a.top_k) - 1, s);
    all_mass = s.through;
  }
  if (a.top_p < 1.0) {  // the shortest list whose mass reaches top_p
    const u64 reach = static_cast<u64>(ceil(a.top_p * static_cast<double>(all_mass)));
    (void)find(a, row, top, false, (reach > 0 ? reach : 1) - 1, s);
    all_mass = s.through;
  }
  const u64 threshold = __umul64hi(a.draws[row] << 11, all_mass);  // draw * 2^-53 * mass, rounded down
  const int id = find(a, row, top, false, threshold, s);
  if (threadIdx.x == 0) out[row] = id;
}

constexpr size_t rounded(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Where the parts of pack_sampling() begin.
struct Packing {
  size_t edits, drafts, leaving, bytes;
  explicit Packing(const Sampling& s)
      : edits(rounded(s.draws.size() * sizeof(uint64_t))),
        drafts(edits + rounded(s.edits.size() * sizeof(TokenEdit))),
        leaving(drafts + rounded(s.drafts.size() * sizeof(int32_t))),
        bytes(leaving + rounded(s.leaving.size() * sizeof(int32_t))) {}
};

}  // namespace

std::vector<char> pack_sampling(const Sampling& s) {
  const Packing at(s);
  std::vector<char> out(at.bytes);
  const auto put = [&](size_t where, const auto& v) {
    if (!v.empty()) std::memcpy(out.data() + where, v.data(), v.size() * sizeof(v[0]));
  };
  put(0, s.draws);
  put(at.edits, s.edits);
  put(at.drafts, s.drafts);
  put(at.leaving, s.leaving);
  return out;
}

size_t sampling_scratch_bytes(const Sampling& s) {
  return static_cast<size_t>(s.rows()) * (kBins * (sizeof(u64) + sizeof(unsigned)) + kParts * sizeof(float));
}

void launch_sampling(gpu::Stream stream, const Sampling& s, float* logits, int64_t n, const void* inputs, void* scratch,
                     int32_t* out) {
  const unsigned rows = static_cast<unsigned>(s.rows());
  const char* in = static_cast<const char*>(inputs);
  const Packing at(s);
  if (!s.edits.empty()) {
    EditArgs e;
    e.logits = logits;
    e.n = n;
    e.edits = reinterpret_cast<const TokenEdit*>(in + at.edits);
    e.n_edits = static_cast<int>(s.edits.size());
    e.drafts = reinterpret_cast<const int32_t*>(in + at.drafts);
    e.leaving = s.leaving.empty() ? nullptr : reinterpret_cast<const int32_t*>(in + at.leaving);
    e.repetition = s.repetition_penalty;
    e.presence = s.presence_penalty;
    e.frequency = s.frequency_penalty;
    const unsigned blocks = (static_cast<unsigned>(e.n_edits) + kPartThreads - 1) / kPartThreads;
    gpu::launch(stream, dim3(blocks, rows), kPartThreads, edit_logits_kernel, e);
  }
  const bool greedy = s.greedy();  // as top_k 1
  SampleArgs a;
  a.logits = logits;
  a.n = n;
  a.temperature = greedy ? 1.0 : static_cast<double>(s.temperature);
  a.floor_below_top = greedy || s.min_p <= 0.0f ? -INFINITY : s.temperature * std::log(s.min_p);
  a.top_k = greedy ? 1 : s.top_k;
  a.top_p = greedy ? 1.0 : static_cast<double>(s.top_p);
  a.by_logit = a.top_k > 0 || a.top_p < 1.0;
  a.bins_per_logit = kBinsPerUnit / (a.temperature < 1.0 ? static_cast<float>(a.temperature) : 1.0f);
  a.ids_per_bin = static_cast<int>((n + kBins - 1) / kBins);
  a.draws = reinterpret_cast<const u64*>(in);
  a.mass = static_cast<u64*>(scratch);
  a.count = reinterpret_cast<unsigned*>(a.mass + rows * size_t{kBins});
  a.parts = reinterpret_cast<float*>(a.count + rows * size_t{kBins});
  gpu::launch(stream, dim3(kParts, rows), kPartThreads, row_top_kernel, a);
  if (a.by_logit) {
    gpu::launch(stream, dim3(kParts, rows), kPartThreads, bin_by_logit_kernel, a);
  } else {
    gpu::launch(stream, dim3(kParts, rows), kPartThreads, bin_by_id_kernel, a);
  }
  gpu::launch(stream, dim3(rows), kList, draw_token_kernel, a, out);
}

}  // namespace dflash::hip
