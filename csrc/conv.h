// The short causal convolution over whole tensors.
#pragma once

#include <vector>

#include "array.h"
#include "conv_task.h"

namespace intarsia {

// `x`, `y` [B, T, D] with channels side by side; `weight` [D, W] without gaps; `initial`, `final` [N, D, W - 1]
// without gaps inside a sequence, or absent. `edges`: the N + 1 edges of sequences packed into one row, or empty.
//
// With `read` and `write` (forward only) both states are rooms of any number of slots, which may be the same: that of
// sequence n is read from slot `read[n]` and written to slot `write[n]`, where no other sequence reads. Then every
// sequence has one token at least and CONV_TOKENS at most, so that one task alone works on its slot.
struct ConvCall {
  Array x, weight, initial;
  std::vector<int64_t> edges;
  bool silu;
  std::vector<int64_t> read = {}, write = {};
};

struct ConvGradientArrays {
  Array d_y, d_final;  // given; the latter may be absent
  Array x, weight;
  Array initial;  // or absent
};

void conv_forward(const ConvCall& call, const Array& y, const Array& final, const ConvKernels& kernels, int threads);

// The sums have one order, whatever the number of threads.
void conv_backward(const ConvCall& call, const ConvGradientArrays& grads, const ConvKernels& kernels, int threads);

}  // namespace intarsia
