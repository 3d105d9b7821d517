// What the kernels of the gated RMSNorm are given.
#pragma once

#include "task.h"

namespace intarsia {

enum class OutputGate : int32_t { none, sigmoid, swish };

constexpr int64_t NORM_NUMBERS = 32768;  // of a run, give or take: how finely the work is shared out

// What all rows have in common.
struct NormSettings {
  Rows weight;  // one row of V numbers
  int V;
  double eps;
  OutputGate gate;
};

// Some rows of V numbers. `z` is absent without a gate.
struct NormRun {
  Rows o, z, y;
  int64_t count;
  Rows d_y, d_o, d_z;  // for the backward pass; `y` is not used there
};

// What one instruction set has for the gated RMSNorm. `wide` says that the kernels compute in float64 and not in
// float32. The backward pass adds up the weight's gradient over its runs: `sum_length` numbers of the kernels' type.
// `add_weights` adds up `count` of those, one behind the other, in their order.
struct NormKernels {
  int64_t (*scratch)(const NormSettings&, bool wide);
  int64_t (*sum_length)(const NormSettings&, bool wide);
  void (*forward)(const NormSettings&, const NormRun* runs, int64_t count, bool wide, char* scratch);
  void (*backward)(const NormSettings&, const NormRun* runs, int64_t count, void* d_weight, bool wide, char* scratch);
  void (*add_weights)(const NormSettings&, const void* sums, int64_t count, const Rows& d_weight, bool wide,
                      char* scratch);
};

}  // namespace intarsia
