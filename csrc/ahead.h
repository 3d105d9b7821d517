// Rows that will be read or written soon, fetched into the cache a few at a time while matrices are multiplied: the
// rows of one head lie far apart, and waiting for them took a fifth of the time.
#pragma once

#include "task.h"

namespace intarsia::INTARSIA_ISA {

class Ahead {
 public:
  // `numbers` of each row, beside what was added since `begin`.
  INLINE void add(const Rows& rows, int numbers) {
    if (rows) streams_[count_++] = {rows, int(numbers * size_of(rows.dtype))};
  }
  // The rows `first .. last - 1` of what is added next; what was to be fetched before is dropped.
  INLINE void begin(int64_t first, int64_t last) { next_ = first, last_ = last, count_ = 0; }

  // Fetches the next row.
  INLINE void fetch() {
    if (next_ >= last_) return;
    for (int i = 0; i < count_; i++) {
      const char* row = streams_[i].rows.data + next_ * streams_[i].rows.stride;
      // Into the second level of the cache: the first holds the matrices.
      for (int at = 0; at < streams_[i].bytes; at += LINE) __builtin_prefetch(row + at, 0, 3);
    }
    next_++;
  }

 private:
  static constexpr int LINE = 64;
  struct Stream {
    Rows rows;
    int bytes;
  };
  Stream streams_[6];
  int count_ = 0;
  int64_t next_ = 0, last_ = 0;
};

}  // namespace intarsia::INTARSIA_ISA
