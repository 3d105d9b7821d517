#include "crowd.h"

#include <algorithm>

namespace intarsia {

int Crowd::allowed(int threads, int64_t now) {
  if (calm()) return threads;
  const std::lock_guard<std::mutex> lock(mutex_);
  int limit = limit_.load(std::memory_order_relaxed);
  if (limit != NO_LIMIT && now >= until_) {
    limit = 2 * limit >= most_ ? NO_LIMIT : 2 * limit;
    limit_.store(limit, std::memory_order_relaxed);
    until_ = now + pause_;
  }
  return std::min(threads, limit);
}

void Crowd::saw(int threads, int64_t begin, int64_t end, int64_t ran) {
  const int64_t lost = end - begin - ran;
  // Where work is shared as it comes, who is away for less than half of the time holds up nobody.
  if (lost < LOST || 2 * lost < end - begin) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  const int limit = limit_.load(std::memory_order_relaxed);
  if (threads > limit) return;  // a call that began before others found out, or was too long for few
  const bool again = until_ && end - until_ < 4 * pause_;
  pause_ = again ? std::min(2 * pause_, LAST_PAUSE) : FIRST_PAUSE;
  most_ = again ? std::max(most_, threads) : threads;
  limit_.store(std::max(1, threads / 2), std::memory_order_relaxed);
  until_ = end + pause_;
}

}  // namespace intarsia
