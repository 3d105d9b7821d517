// Softmax attention of the queries of a batch to their sequences' cached keys.
#pragma once

#include "array.h"
#include "attend_task.h"

namespace intarsia {

// Where the entries of a sequence lie: entry i at `address + i * entry_bytes`, or, in pages, entry i % page_size of
// page `pages[i / page_size]`, pages being `page_bytes` apart. The heads of an entry are `head_bytes` apart.
struct AttendEntries {
  const char* address;
  const int64_t* pages;  // or null
  int64_t page_size, page_bytes, entry_bytes, head_bytes;

  const char* at(int64_t i) const {
    return pages ? address + pages[i / page_size] * page_bytes + i % page_size * entry_bytes
                 : address + i * entry_bytes;
  }
};

// The queries `begin` .. `end` of the rows of q: those of the last tokens of a sequence of `keys` keys, of which
// `held` .. `last` are there to be looked at.
struct AttendSequence {
  int64_t begin, end, keys, held, last;
  AttendEntries k, v;
};

// q [R, H, K], o [R, H, V]; HKV key heads, H a multiple of it. `sinks` [H] or null.
struct AttendCall {
  AttendForm form;
  Array q, o;
  int HKV;
  const float* sinks;
  const AttendSequence* sequences;
  int64_t count;
  // What each row of each head has of earlier keys, and has after this call: [R, H, padded V + 2], or null. Where it
  // is not the `last` call, there are no results yet.
  float* carried;
  bool last;
};

void attend(const AttendCall& call, const AttendKernels& kernels, int threads);

// The numbers that are carried of a row of a head.
int64_t attend_carried(const AttendForm& form, const AttendKernels& kernels);

}  // namespace intarsia
