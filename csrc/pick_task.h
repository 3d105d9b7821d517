// What the kernels of the choice of blocks, by an indexer's scores, are given.
#pragma once

#include "task.h"

namespace intarsia {

// Keys of a sequence whose products are made together.
constexpr int PICK_KEYS = 64;

// Key e stands for the `wide` strides up to its own, a block for `size` of them. What a head gives a key, of its
// product p with the query, is p, or with weights `weight_h p` (or `weight_h max(p, 0)`), or its share of the softmax
// over the keys seen. Of a group of heads they are added up.
struct PickForm {
  int heads, groups;
  int64_t size, wide;
  bool softmax, relu;
  bool summed;    // a block has the sum of its keys' scores, each times the strides in common, and not the largest
  float largest;  // what is more, and what is no number, is this
};

// Queries [H, K] of one token, each head's row padded with zeros, and keys that all heads share or divide between them.
struct PickQueries {
  int64_t H, heads, K, padded;
  const float* q;
};

struct PickKernels {
  int (*padded)(int64_t K);  // numbers
  int (*beside)();           // heads that are worked on together: so many rows of q are there, the last of them zero
  // products[h * stride + i] of `count` keys, up to PICK_KEYS, each at `keys[i] + head * head_bytes`.
  void (*products)(const PickQueries&, const char* const* keys, int count, int64_t head_bytes, Dtype, float* products,
                   int64_t stride);
  // scores[e] of the keys from `begin` to `end` of a group of `count` heads; `weights` [count] or null, `scratch` as
  // long as the scores.
  void (*scores)(const PickForm&, const float* products, int64_t stride, const float* weights, int count, int64_t begin,
                 int64_t end, float* scores, float* scratch);
  // The values of the blocks up to `blocks`: -inf where there is no key.
  void (*values)(const PickForm&, const float* scores, int64_t begin, int64_t end, int64_t blocks, float* values);
  // The first i from `begin` on with x[i] > threshold, or `end`.
  int64_t (*next_above)(const float* x, int64_t begin, int64_t end, float threshold);
};

}  // namespace intarsia
