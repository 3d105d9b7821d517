// What the kernels of softmax attention to cached keys are given.
#pragma once

#include "task.h"

namespace intarsia {

// Keys of a chunk are worked on together, one chunk after the other from the first key of a sequence on: what a query
// gets of a chunk is computed from nothing and then added to what it has. So a chunk may be another thread's, and a
// query's numbers depend on no later key and on no other query. A block is what a chunk is worked on by.
constexpr int ATTEND_CHUNK = 256, ATTEND_BLOCK = 64;
// Rows of queries, of all heads that share a key head, that are worked on together.
constexpr int ATTEND_ROWS = 32;

struct AttendForm {
  Dtype dtype;  // of queries, keys, values and results: float32 or bfloat16
  int K, V;
  double scale;
  int64_t window;  // how many keys a query sees; 0: all
};

// The keys `first` .. `last` of a sequence, of one head: the addresses of keys and values, `k[i]` being those of
// first + i.
struct AttendKeys {
  int64_t first, last;
  const char *k[ATTEND_CHUNK], *v[ATTEND_CHUNK];
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
  // The bytes of a prepared row, the numbers of a row of `sums`, and the scratch of `chunk`.
  int64_t (*prepared)(const AttendForm&);
  int64_t (*padded)(const AttendForm&);
  int64_t (*scratch)(const AttendForm&);
  void (*prepare)(const AttendForm&, const Rows& q, int64_t row, char* to);
  // What rows get of a chunk of keys, from nothing.
  void (*chunk)(const AttendForm&, const AttendKeys&, const AttendRows&, char* scratch);
  // Adds `more` to `rows`.
  void (*merge)(const AttendForm&, const AttendRows& rows, const AttendRows& more);
  // The result of row i, with a `sink` that takes its part of the weights (-inf: none), into row `to` of `o`.
  void (*finish)(const AttendForm&, const AttendRows& rows, int i, double sink, const Rows& o, int64_t to);
};

}  // namespace intarsia
