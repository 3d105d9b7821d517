#include "parallel.h"

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <new>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "crowd.h"

namespace intarsia {

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// While it lives, what this thread computes with SSE and AVX takes and leaves zero in the place of numbers
// below 1.2e-38 (2.2e-308 in double precision), which these registers hold with fewer digits. Decays multiply to such
// numbers all the time, and Intel's processors take a hundred cycles for each; others that we know take none, and are
// left alone.
class TinyIsZero {
 public:
#if defined(__SSE2__)
  TinyIsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | TAKEN | LEFT); }
  ~TinyIsZero() { _mm_setcsr(before_); }
#else
  TinyIsZero() {}  // not left to the compiler: it would find the object unused
#endif
  TinyIsZero(const TinyIsZero&) = delete;
  TinyIsZero& operator=(const TinyIsZero&) = delete;

#if defined(__SSE2__)
 private:
  static constexpr unsigned TAKEN = 0x0040, LEFT = 0x8000;
  const unsigned before_;
#endif
};

// Kept by each thread for its next call: fresh memory would be paid for in page faults.
char* scratch_of_thread(int64_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, size_t(size))));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// For how long this thread has had a core since it was made, or where that is not known since some moment.
int64_t time_on_core() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * 1'000'000'000 + time.tv_nsec;
#endif
  return now();
}

// Of the process: what one call has found out about the machine is true for the next.
Crowd crowd;

// Runs `body(thread, scratch)` on each of some threads.
template <class Body>
void on_threads(int threads, int64_t scratch_bytes, const Body& body) {
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const int64_t begin = now();
  // OpenMP's threads and not our own: they are the ones that PyTorch's operators run on, so the two never compete.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t had = thread ? time_on_core() : 0;
    try {
      const TinyIsZero mode;
      body(thread, scratch_of_thread(scratch_bytes));
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
    if (thread) crowd.saw(threads, begin, now(), time_on_core() - had);  // the first waits for the others
  }
  if (failure) std::rethrow_exception(failure);
}

// Of each thread's share: so few are done before another thread could help.
constexpr int64_t FEW_TASKS = 8;

// What is so quick that it is not worth waiting for another thread's turn, in nanoseconds.
constexpr int64_t QUICK = 2'000'000;

void on_this_thread(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work) {
  const TinyIsZero mode;
  char* scratch = scratch_of_thread(scratch_bytes);
  for (int64_t i = 0; i < count; i++) work(i, scratch);
}

// Work that goes to whoever asks for some.
class Queue {
 public:
  Queue(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work)
      : count_(count), scratch_bytes_(scratch_bytes), work_(work) {}

  // Until all is done, or begun by others, or the time has come.
  void run(int threads, int64_t until = std::numeric_limits<int64_t>::max()) {
    const auto body = [&](int, char* scratch) {
      const bool limited = until != std::numeric_limits<int64_t>::max();
      while (!(limited && now() > until)) {
        const int64_t i = next_.fetch_add(1);
        if (i >= count_) return;
        work_(i, scratch);
      }
    };
    if (threads > 1) return on_threads(threads, scratch_bytes_, body);
    const TinyIsZero mode;
    body(0, scratch_of_thread(scratch_bytes_));
  }
  bool empty() const { return next_.load() >= count_; }

  // On a busy machine: by few threads, and by all if those are not soon done.
  void run_in_crowd(int threads) {
    const int64_t begin = now();
    run(crowd.allowed(threads, begin), begin + QUICK);
    if (!empty()) run(threads);
  }

 private:
  const int64_t count_, scratch_bytes_;
  const std::function<void(int64_t, char*)>& work_;
  std::atomic<int64_t> next_{0};
};

}  // namespace

void parallel(int64_t count, int threads, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) return on_this_thread(count, scratch_bytes, work);
  Queue queue(count, scratch_bytes, work);
  crowd.calm() ? queue.run(threads) : queue.run_in_crowd(threads);
}

void parallel_shares(int64_t count, int threads, int64_t scratch_bytes,
                     const std::function<void(int64_t, char*)>& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) return on_this_thread(count, scratch_bytes, work);
  if (!crowd.calm()) return Queue(count, scratch_bytes, work).run_in_crowd(threads);
  const auto begin = [&](int thread) { return count * thread / threads; };
  if (count <= FEW_TASKS * threads) {
    on_threads(threads, scratch_bytes, [&](int thread, char* scratch) {
      for (int64_t i = begin(thread); i < begin(thread + 1); i++) work(i, scratch);
    });
    return;
  }
  // How far each share has come; of a cache line each.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Share[]> shares(new Share[size_t(threads)]);
  for (int t = 0; t < threads; t++) {
    shares[size_t(t)].next = begin(t);
    shares[size_t(t)].end = begin(t + 1);
  }
  on_threads(threads, scratch_bytes, [&](int thread, char* scratch) {
    for (int helped = 0; helped < threads; helped++) {
      Share& share = shares[size_t((thread + helped) % threads)];
      for (int64_t i; (i = share.next.fetch_add(1)) < share.end;) work(i, scratch);
    }
  });
}

}  // namespace intarsia
