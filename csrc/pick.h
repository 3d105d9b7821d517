// Which blocks of tokens queries pick, by the products of index queries and keys.
#pragma once

#include "array.h"
#include "attend.h"
#include "pick_task.h"

namespace intarsia {

// `q` [T, H, K] float32 without gaps, and `count` keys of `heads` heads, to `products` [T, H, count].
struct PickProducts {
  Array q, products;
  AttendEntries keys;
  Dtype dtype;
  int64_t heads, count;
};
void pick_products(const PickProducts& call, const PickKernels& kernels, int threads);

// The queries of T tokens, the first of which stands at `place`: a query at i sees the keys e with `wide - 1 <= e` and
// `(e + 1) stride <= i + 1`, and picks of the blocks of `block` tokens up to its own, or with a `tail` of those that
// are complete and its own where that is not.
struct PickCall {
  PickForm form;
  Array products;        // [T, H, S]
  const float* weights;  // [T, H] or null
  int64_t place, stride, block, count, first, last;
  bool tail;
  int32_t* out;  // [T, groups, slots]
  int64_t slots;
};
void pick(const PickCall& call, const PickKernels& kernels, int threads);

}  // namespace intarsia
