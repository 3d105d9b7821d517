// What the kernels of attention to picked tokens, with its gradients, are given.
#pragma once

#include "task.h"

namespace intarsia {

// The query of one token for `rows` heads that read the same `count` tokens: [beside a multiple][padded K] in float32,
// rows that are no heads being zero. Keys and values [S][padded K], [S][padded V] in float32.
struct GatheredQuery {
  int rows, K, V;  // all padded
  int64_t count;
  const int32_t* tokens;
  float scale;
  const float *q, *keys, *values;
};

struct GatheredKernels {
  int (*padded)(int64_t numbers);
  int (*rows)(int64_t heads);  // padded
  // The numbers of scratch for so many padded rows and tokens.
  int64_t (*scratch)(int rows, int64_t count);
  // o [rows][V] and the logarithm of each row's sum of weights.
  void (*forward)(const GatheredQuery&, float* o, float* log_sum, float* scratch);
  // d_q [rows][K] is written; to d_keys [S][K] and d_values [S][V] something is added.
  void (*backward)(const GatheredQuery&, const float* d_o, const float* log_sum, float* d_q, float* d_keys,
                   float* d_values, float* scratch);
};

}  // namespace intarsia
