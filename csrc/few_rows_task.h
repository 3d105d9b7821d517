// What the kernels of products with few rows are given: y = x Wᵀ, where x has so few rows that reading the weights is
// what takes the time; or many, where nothing else multiplies their form as fast.
#pragma once

#include "task.h"

namespace intarsia {

enum class WeightFormat : int32_t { float32, bfloat16, int8, int4 };

// Numbers of a row that are worked on together. A row of int4 is packed in blocks of four steps, 64 bytes: bits
// 4 i .. 4 i + 3 of its 16-bit word j are number 32 i + j.
constexpr int FEW_ROWS_STEP = 32, INT4_BLOCK = 128;

// Rows of weights of a task.
constexpr int FEW_ROWS_TASK = 16;

// W [N, K] and what its rows have in common. An integer q stands for (q - zero) scale, an int4 being 0 .. 15 less 8; a
// scale and a zero belong to `group` numbers of a row, and are bfloat16.
struct FewRowsForm {
  WeightFormat format;
  Dtype x;  // of the rows that are given
  int64_t N, K;
  int64_t row_bytes;      // from one row of weights to the next; int8 is padded to whole steps, int4 to whole blocks
  int64_t group, groups;  // `groups` of a row; 0 where weights are floating-point numbers
  bool zeros;

  INLINE int64_t padded() const { return (K + INT4_BLOCK - 1) / INT4_BLOCK * INT4_BLOCK; }
};

// One matrix of weights.
struct FewRowsWeights {
  const char* data;
  const uint16_t *scales, *zeros;  // [N, groups] or null
};

// The rows `first` .. `last` of the weights and `rows` prepared rows of x.
struct FewRowsTask {
  FewRowsWeights weights;
  int64_t first, last;
  const char* x;
  int64_t rows;
  Rows y;  // of row i: row places[i]
  const int64_t* places;
  const float* bias;  // [N] or null
};

// From one row to the next in the cache: rows that all began at the same place of a page would push each other out.
INLINE constexpr int64_t apart(int64_t bytes) {
  const int64_t lines = (bytes + 63) / 64;
  return 64 * (lines + (64 + 17 - lines % 64) % 64);
}

struct FewRowsKernels {
  // The bytes from one row of x to the next as `product` reads it, and how it is brought into that form.
  int64_t (*prepared)(const FewRowsForm&);
  // How many rows of x `product` should have at a time, if there are many.
  int64_t (*together)(const FewRowsForm&);
  void (*prepare)(const FewRowsForm&, const Rows& x, int64_t row, char* to);
  // Each number of y is summed in one order, whatever other rows and threads there are.
  void (*product)(const FewRowsForm&, const FewRowsTask&);
  // Row n of integers as K bfloat16.
  void (*unpack)(const FewRowsForm&, const FewRowsWeights&, int64_t n, uint16_t* to);
};

}  // namespace intarsia
