#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include "core/error.h"
#include "core/topology.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace dflash {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the gap between two ops of one token
constexpr int64_t kMaxShares = 65535;                  // what 16 bits of a Share can count

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or the time is up; says which.
template <typename Done>
bool spin_until(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 128; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

constexpr uint64_t pack(uint32_t generation, int64_t begin, int64_t end) {
  return (static_cast<uint64_t>(generation) << 32) | (static_cast<uint64_t>(begin) << 16) | static_cast<uint64_t>(end);
}

}  // namespace

int ThreadPool::default_threads() {
  const int cores = physical_cores(allowed_cpus()), quota = cpu_quota();
  return quota > 0 ? std::min(cores, quota) : cores;
}

ThreadPool::ThreadPool(int n_threads)
    : n_threads_(n_threads > 0 ? n_threads : default_threads()), shares_(new Share[static_cast<size_t>(n_threads_)]) {
  threads_.reserve(static_cast<size_t>(n_threads_ - 1));
  try {
    for (int t = 1; t < n_threads_; ++t) threads_.emplace_back([this, t] { worker(t); });
  } catch (const std::system_error& e) {
    const size_t started = threads_.size();
    stop();
    fail("n_threads: ", n_threads_, " threads expected, the system starts ", started + 1, " (", e.what(),
         "); use fewer");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t n, Call call, const void* f) {
  const int64_t grain = (n + kMaxShares - 1) / kMaxShares;
  const int64_t shares = (n + grain - 1) / grain;
  call_.store(call, std::memory_order_relaxed);
  f_.store(f, std::memory_order_relaxed);
  n_.store(n, std::memory_order_relaxed);
  grain_.store(grain, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  for (int t = 0; t < n_threads_; ++t) {
    const uint64_t range = pack(generation, shares * t / n_threads_, shares * (t + 1) / n_threads_);
    shares_[static_cast<size_t>(t)].range.store(range, std::memory_order_release);
  }
  generation_.store(generation, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }
  work(0);
  const auto finished = [&] { return done_.load(std::memory_order_acquire) == shares; };
  while (!spin_until(finished)) std::this_thread::yield();  // a worker lost its core: let it have this one
  if (failed_.load(std::memory_order_relaxed)) {
    std::exception_ptr error;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      error = error_;
      error_ = nullptr;
      failed_ = false;
    }
    std::rethrow_exception(error);
  }
}

void ThreadPool::work(int thread) {
  int64_t finished = 0;
  for (int k = 0; k < n_threads_; ++k) {  // own share first, then the others'
    const int owner = (thread + k) % n_threads_;
    std::atomic<uint64_t>& range = shares_[static_cast<size_t>(owner)].range;
    uint64_t seen = range.load(std::memory_order_acquire);
    for (;;) {
      const int64_t begin = (seen >> 16) & 0xffff, end = seen & 0xffff;
      if (begin >= end) break;
      const Call call = call_.load(std::memory_order_relaxed);
      const void* f = f_.load(std::memory_order_relaxed);
      const int64_t n = n_.load(std::memory_order_relaxed), grain = grain_.load(std::memory_order_relaxed);
      const uint32_t generation = static_cast<uint32_t>(seen >> 32);
      const bool own = owner == thread;  // the owner takes from the front, a thief from the back
      const uint64_t next = own ? pack(generation, begin + 1, end) : pack(generation, begin, end - 1);
      if (!range.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const int64_t share = own ? begin : end - 1;
      if (!failed_.load(std::memory_order_relaxed)) {
        try {
          call(f, share * grain, std::min(n, (share + 1) * grain), thread);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex_);
          if (!error_) error_ = std::current_exception();
          failed_ = true;
        }
      }
      ++finished;
      seen = range.load(std::memory_order_acquire);
    }
  }
  if (finished > 0) done_.fetch_add(finished, std::memory_order_acq_rel);
}

void ThreadPool::wait_for_work(uint32_t seen) {
  const auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
  if (spin_until(changed)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void ThreadPool::worker(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_work(seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    work(thread);
  }
}

}  // namespace dflash
