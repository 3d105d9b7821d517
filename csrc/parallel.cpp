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

}  // namespace

void parallel(int64_t count, int threads, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) {
    char* scratch = scratch_of_thread(scratch_bytes);
    for (int64_t i = 0; i < count; i++) work(i, scratch);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  // OpenMP's threads and not our own: they are the ones that PyTorch's operators run on, so the two never compete.
#pragma omp parallel num_threads(threads)
  {
    try {
      char* scratch = scratch_of_thread(scratch_bytes);
      for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, scratch);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace intarsia
