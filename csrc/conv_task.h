// What the kernels of the short convolution are given.
#pragma once

#include "task.h"

namespace intarsia {

constexpr int CONV_CHANNELS = 512;  // channels of a block: its rows and weights stay in the nearest cache
constexpr int CONV_TOKENS = 256;    // tokens of a run, give or take: how finely the work is shared out

// A block of channels.
struct ConvBlock {
  Rows weight;  // one row: W numbers for each channel, the last for the token itself
  int channels, W;
  bool silu;
};

// A run of tokens `first .. last - 1` of one sequence, in one block of channels. Rows are counted from the start of
// the sequence. The states are W - 1 rows, the oldest first; they may be absent.
struct ConvRun {
  Rows x, y;
  int64_t first, last;
  int64_t tokens;  // of the whole sequence
  Rows initial, final;

  // For the backward pass; `y` and `final` are not used there.
  Rows d_y, d_final, d_x, d_initial;
};

// What one instruction set has for the short convolution. `wide` says that the kernels compute in float64 and not in
// float32. The backward pass adds up the weights' gradient over its runs: [W, padded(channels)] in the kernels' type,
// at most W * CONV_CHANNELS numbers. `add_weights` adds up `count` of those, `stride` numbers apart, in their order.
struct ConvKernels {
  int64_t (*scratch)(const ConvBlock&, bool wide);
  void (*forward)(const ConvBlock&, const ConvRun* runs, int64_t count, bool wide, char* scratch);
  void (*backward)(const ConvBlock&, const ConvRun* runs, int64_t count, void* d_weight, bool wide, char* scratch);
  void (*add_weights)(const ConvBlock&, const void* sums, int64_t count, int64_t stride, const Rows& d_weight,
                      bool wide, char* scratch);
};

}  // namespace intarsia
