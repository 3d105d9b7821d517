// What the kernels of the gated activation of feed-forwards are given.
#pragma once

#include "task.h"

namespace intarsia {

constexpr int64_t SWIGLU_NUMBERS = 32768;  // of a run, give or take: how finely the work is shared out

// Some rows of `width` numbers, all of one dtype.
struct SwigluRun {
  Rows gate, up, y;
  int width;
  int64_t count;
  Rows d_y, d_gate, d_up;  // for the backward pass; `y` is not used there
};

// What one instruction set has for it. `wide` says that the kernels compute in float64 and not in float32.
struct SwigluKernels {
  void (*forward)(const SwigluRun&, bool wide);
  void (*backward)(const SwigluRun&, bool wide);
};

}  // namespace intarsia
