// What the kernels of the decode step are given.
#pragma once

#include "linear_task.h"
#include "norm_task.h"

namespace intarsia {

constexpr int DECODE_ROWS = 8;  // tokens of a key head, or key heads of a token, that are worked on side by side

// The layer: what all sequences have in common. Its channels are those of q, then of k, then of v. The weights are of
// the kernels' type, and behind their last number there is room to read a whole vector.
struct DecodeLayer {
  int H, HV, K, V;
  double scale;
  bool erases, normalize;  // as in LinearTask
  bool general;            // erases along `a` what `b` reads of the board before it decays: no `beta`
  Decay decay;
  Gate gate;
  double bound;
  double beta_scale;
  const void* rate;  // [HV]: exp(A_log), or null without a gate
  const void* bias;  // dt_bias [HV, K], or [HV] for a decay per head, or null
  int W;             // taps of the convolution; 0 without one
  bool silu;
  const void* conv_weight;  // [W, channels], the last row for the token itself
  const void* norm_weight;  // [V], or null without a norm
  double norm_eps;
  OutputGate output_gate;

  INLINE int group() const { return HV / H; }
  INLINE int channels() const { return 2 * H * K + HV * V; }
};

// Key heads of one sequence, DECODE_ROWS at most, and the value heads that they serve. The rows are those of the
// sequence's tokens, with the numbers of all heads. The states are those of all heads, of the kernels' type: boards
// [HV, K, V] and the last inputs of the convolution [W - 1, channels]. `from` and `to` may be the same; without `from`
// the sequence begins.
struct DecodeTask {
  int head, heads;
  int64_t tokens;
  Rows x, g, beta, z, o, a, b;
  const void *board_from, *conv_from;
  void *board_to, *conv_to;
};

// What one instruction set has for the decode step. `wide` says that the kernels compute in float64 and not in
// float32; the states are of that type as well.
struct DecodeKernels {
  int64_t (*scratch)(const DecodeLayer&, bool wide);
  void (*step)(const DecodeLayer&, const DecodeTask&, bool wide, char* scratch);
};

}  // namespace intarsia
