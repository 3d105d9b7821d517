// What the kernels of the softmax over rows of logits are given.
#pragma once

#include "task.h"

namespace intarsia {

constexpr int64_t SOFTMAX_NUMBERS = 32768;  // of a run, give or take: how finely the work is shared out

// Some rows of V logits. `log_sum` and `gradient` have one number of each row.
struct SoftmaxRun {
  Rows logits, log_sum;
  int V;
  int64_t count;
  const int64_t* targets;  // for the gradient, as the rest; one that is not from 0 to V - 1 is no column of these
  Rows gradient, d_logits;
};

// What one instruction set has for it. `wide` says that the kernels compute in float64 and not in float32.
//
//   log_sums:    log_sum = ln(sum(exp(logits)))
//   gradients:   d_logits = (exp(logits - log_sum) - [column == target]) gradient
struct SoftmaxKernels {
  void (*log_sums)(const SoftmaxRun&, bool wide);
  void (*gradients)(const SoftmaxRun&, bool wide);
};

}  // namespace intarsia
