// What the kernels of a row program are given: what is done to each row alone, between products.
#pragma once

#include "task.h"

namespace intarsia {

struct RowKernels {
  // y = silu(gate) up, of rows of `width` numbers.
  void (*swiglu)(const Rows& gate, const Rows& up, const Rows& y, int64_t row, int64_t width);
  // y = scale y + x.
  void (*add)(const Rows& x, double scale, const Rows& y, int64_t row, int64_t width);
};

}  // namespace intarsia
