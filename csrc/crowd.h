// How many threads share work while other programs want the cores too.
//
// A team is done when its last thread is. Where each core has another program to run as well, some thread always waits
// for its turn, milliseconds for a product that takes a tenth of one; fewer threads, in the end one, then get more
// done. A call with more work than fits in a few milliseconds takes all of them all the same.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace intarsia {

// Times are nanoseconds of one clock that only goes forward.
class Crowd {
 public:
  // How many of `threads` should work now.
  int allowed(int threads, int64_t now);

  // What one of `threads` saw: it could have run from `begin` to `end`, and ran for `ran` of that.
  void saw(int threads, int64_t begin, int64_t end, int64_t ran);

  // Whether all may work. The one question that is asked in every call.
  bool calm() const { return limit_.load(std::memory_order_relaxed) == NO_LIMIT; }

 private:
  // Less than this is what waking a thread takes. The pause after which more threads are tried again grows while they
  // are in vain: a try costs some milliseconds.
  static constexpr int64_t LOST = 500'000, FIRST_PAUSE = 5'000'000, LAST_PAUSE = 200'000'000;
  static constexpr int NO_LIMIT = 1 << 30;

  std::atomic<int> limit_{NO_LIMIT};
  std::mutex mutex_;  // of what follows
  int most_ = 0;      // threads of the teams that were held up
  int64_t pause_ = FIRST_PAUSE, until_ = 0;
};

}  // namespace intarsia
