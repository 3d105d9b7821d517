// The softmax over rows of logits, as a loss needs it.
#pragma once

#include "array.h"
#include "softmax_task.h"

namespace intarsia {

// `logits` [N, V], the numbers of a row side by side; `log_sum` [N] without gaps.
void log_sums(const Array& logits, const Array& log_sum, const SoftmaxKernels& kernels, int threads);

// `targets` and `gradient` [N] without gaps, `d_logits` [N, V].
void softmax_gradients(const Array& logits, const Array& log_sum, const int64_t* targets, const Array& gradient,
                       const Array& d_logits, const SoftmaxKernels& kernels, int threads);

}  // namespace intarsia
