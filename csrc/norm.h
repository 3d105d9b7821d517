// The gated RMSNorm over whole tensors.
#pragma once

#include "array.h"
#include "norm_task.h"

namespace intarsia {

// `o`, `z`, `y` [A, B, C, V] in one shape, the numbers of a row side by side; `weight` [V]; no `z` without a gate.
struct NormCall {
  Array o, z, weight;
  double eps;
  OutputGate gate;
};

struct NormGradientArrays {
  Array d_y;  // given
  Array o, z, weight;
};

void norm_forward(const NormCall& call, const Array& y, const NormKernels& kernels, int threads);

// The sums have one order, whatever the number of threads.
void norm_backward(const NormCall& call, const NormGradientArrays& grads, const NormKernels& kernels, int threads);

}  // namespace intarsia
