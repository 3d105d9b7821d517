#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

namespace intarsia {

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
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

// Runs `body(thread, scratch)` on each of some threads.
template <class Body>
void on_threads(int threads, int64_t scratch_bytes, const Body& body) {
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  // OpenMP's threads and not our own: they are the ones that PyTorch's operators run on, so the two never compete.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    try {
      body(thread, scratch_of_thread(scratch_bytes));
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// Of each thread's share: so few are done before another thread could help.
constexpr int64_t FEW_TASKS = 8;

void on_this_thread(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work) {
  char* scratch = scratch_of_thread(scratch_bytes);
  for (int64_t i = 0; i < count; i++) work(i, scratch);
}

}  // namespace

void parallel(int64_t count, int threads, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) return on_this_thread(count, scratch_bytes, work);
  std::atomic<int64_t> next{0};
  on_threads(threads, scratch_bytes, [&](int, char* scratch) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, scratch);
  });
}

void parallel_shares(int64_t count, int threads, int64_t scratch_bytes,
                     const std::function<void(int64_t, char*)>& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) return on_this_thread(count, scratch_bytes, work);
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
