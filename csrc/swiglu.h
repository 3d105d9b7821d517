// The gated activation of feed-forwards over whole tensors.
#pragma once

#include "array.h"
#include "swiglu_task.h"

namespace intarsia {

// All are [N, width] of one dtype, the numbers of a row side by side.
void swiglu_forward(const Array& gate, const Array& up, const Array& y, const SwigluKernels& kernels, int threads);

void swiglu_backward(const Array& gate, const Array& up, const Array& d_y, const Array& d_gate, const Array& d_up,
                     const SwigluKernels& kernels, int threads);

}  // namespace intarsia
