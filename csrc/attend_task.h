// What the kernels of softmax attention to cached keys are given.
#pragma once

#include "task.h"

namespace intarsia {

// Keys of a chunk are worked on together, one chunk after the other from the first key of a sequence on: what a query
// gets of a chunk is computed from nothing and then added to what it has. So a chunk may be another thread's, and a
// query's numbers depend on no later key and on no other query. A block is what a chunk is worked on by.
constexpr int ATTEND_CHUNK = 256, ATTEND_BLOCK = 64;
// Rows of queries, of all heads that share a key head, that are worked on together at most.
constexpr int ATTEND_ROWS = 128;

struct AttendForm {
  Dtype dtype;  // of queries, keys, values and results: float32 or bfloat16
  int K, V;
  double scale;
  int64_t window;  // how many keys a query sees; 0: all
};

// Keys of one head, a block at most: the number of the first, and where the entries are that hold them and their
// values, each so many bytes behind the beginning of its entry.
struct AttendKeys {
  int64_t first;
  int count;
  const char *const *k, *const *v;
  int64_t k_offset, v_offset;
};

// Rows of queries that see keys of one head, and what they have so far: `sums` of values, each weighted by e to the
// logit less `most`, and the sum of these weights.
struct AttendRows {
  int count;
  const char* q;               // prepared
  const int64_t* positions;    // of each row's token: it sees the keys up to there
  float *most, *total, *sums;  // [count], [count], [count][padded V]
};

struct AttendKernels {
  // The bytes of a prepared row, the numbers of a row of `sums`, and the scratch of `block`.
  int64_t (*prepared)(const AttendForm&);
  int64_t (*padded)(const AttendForm&);
  int64_t (*scratch)(const AttendForm&);
  void (*prepare)(const AttendForm&, const Rows& q, int64_t row, char* to);
  // Lets rows have nothing.
  void (*clear)(const AttendForm&, const AttendRows&);
  // Adds what rows get of a block of keys. The keys that come `next`, if any, are fetched from memory meanwhile.
  void (*block)(const AttendForm&, const AttendKeys&, const AttendKeys* next, const AttendRows&, char* scratch);
  // Adds `more` to `rows`.
  void (*merge)(const AttendForm&, const AttendRows& rows, const AttendRows& more);
  // The result of row i, with a `sink` that takes its part of the weights (-inf: none), into row `to` of `o`.
  void (*finish)(const AttendForm&, const AttendRows& rows, int i, double sink, const Rows& o, int64_t to);
};

}  // namespace intarsia
