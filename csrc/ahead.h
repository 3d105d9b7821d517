// Rows that will be read or written soon, fetched into the cache a few at a time while matrices are multiplied: the
// rows of one head lie far apart, and waiting for them took a fifth of the time.
#pragma once

#include "task.h"

namespace intarsia::INTARSIA_ISA {

class Ahead {
 public:
  // What is added next are `count` rows side by side, to be fetched when all that came before has been.
  INLINE void begin(int64_t count) {
    if (size_ == GROUPS) first_ = (first_ + 1) % GROUPS, size_--;  // whose time is over
    groups_[(first_ + size_++) % GROUPS] = {{}, 0, 0, count};
  }
  // `numbers` of each row.
  INLINE void add(const Rows& rows, int64_t numbers) {
    Group& group = groups_[(first_ + size_ - 1) % GROUPS];
    if (rows) group.streams[group.streams_count++] = {rows, numbers * size_of(rows.dtype)};
  }

  // Fetches the next rows.
  INLINE void fetch() {
    for (int lines = 0; size_ && lines < LINES_AT_ONCE;) {
      Group& group = groups_[first_];
      if (group.next >= group.count) {
        first_ = (first_ + 1) % GROUPS, size_--;
        continue;
      }
      for (int i = 0; i < group.streams_count; i++) {
        const Stream& stream = group.streams[i];
        const char* row = stream.rows.data + group.next * stream.rows.stride;
        for (int64_t at = 0; at < stream.bytes; at += LINE, lines++) __builtin_prefetch(row + at);
      }
      group.next++;
    }
  }

 private:
  static constexpr int LINE = 64, LINES_AT_ONCE = 16, GROUPS = 4, STREAMS = 3;
  struct Stream {
    Rows rows;
    int64_t bytes;
  };
  struct Group {
    Stream streams[STREAMS];
    int streams_count;
    int64_t next, count;
  };
  Group groups_[GROUPS];
  int first_ = 0, size_ = 0;
};

}  // namespace intarsia::INTARSIA_ISA
