#pragma once
// A fixed team of threads for many short loops. Each thread owns a contiguous part of the index range (the same part
// every time, so its caches stay warm) and takes from the others when its own is done. Workers spin for a few tens of
// microseconds after a loop, then sleep. One loop runs at a time; the calling thread is thread 0 of the team.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dflash {

class ThreadPool {
 public:
  // n_threads <= 0: default_threads(). Throws Error where the system does not start as many.
  explicit ThreadPool(int n_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }

  // The cores this process may run on: its affinity mask, which its threads inherit and nothing here changes, and the
  // quota of its control group. Two hardware threads of a core count once: they share what the kernels are bound by.
  static int default_threads();

  // f(i, thread) for i in [0, n), thread in [0, size()). The first exception thrown by f is rethrown here after the
  // loop has ended; the remaining indices may have been skipped.
  template <typename F>
  void parallel_for(int64_t n, const F& f) {
    if (n_threads_ == 1 || n <= 1) {
      for (int64_t i = 0; i < n; ++i) f(i, 0);
      return;
    }
    run(n, &call<F>, &f);
  }

 private:
  using Call = void (*)(const void* f, int64_t begin, int64_t end, int thread);

  template <typename F>
  static void call(const void* f, int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(f))(i, thread);
  }

  // Indices a thread has not started: generation (32 bits), begin (16), end (16). A claim is one compare-and-swap
  // over all three, so a thread that overslept a loop can never claim work with the old loop's function.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };

  void stop();  // ends and joins the threads
  void run(int64_t n, Call call, const void* f);
  void work(int thread);
  void worker(int thread);
  void wait_for_work(uint32_t seen);

  int n_threads_;
  std::unique_ptr<Share[]> shares_;
  // The current loop. Written only between loops.
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> f_{nullptr};
  std::atomic<int64_t> n_{0}, grain_{1};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int64_t> done_{0};  // indices finished, in units of grain_
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;  // guards error_ and the sleep
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace dflash
