// Attention of whole sequences to picked tokens, and its gradients.
#pragma once

#include "array.h"
#include "gathered_task.h"

namespace intarsia {

// q, o [R, H, K] and [R, H, V], k [R, HKV, K], v [R, HKV, V] of sequences that lie one behind the other, `edges` [count
// + 1] apart. `picked` [R, G, n] without gaps: numbers of blocks of `block` tokens of a query's own sequence, -1 behind
// them. `log_sum` [R, H] float32 without gaps.
struct GatheredCall {
  Array q, k, v, o;
  const int32_t* picked;
  int64_t groups, slots, block;
  float scale;
  const int64_t* edges;
  int64_t count;
  float* log_sum;
};

void gathered_forward(const GatheredCall& call, const GatheredKernels& kernels, int threads);

// `call.o` is the gradient of the results; d_q, d_k and d_v have the shapes of q, k and v.
void gathered_backward(const GatheredCall& call, const Array& d_q, const Array& d_k, const Array& d_v,
                       const GatheredKernels& kernels, int threads);

}  // namespace intarsia
