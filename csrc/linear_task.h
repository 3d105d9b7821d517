// What the kernels of the linear family are given.
#pragma once

#include "task.h"

namespace intarsia {

enum class Decay : int32_t { none, head, channel };

// How the raw numbers of the decay become its logarithm (see docs/kernels.md).
enum class Gate : int32_t { none, softplus, bounded };

// One head of one sequence, or a slice of its value columns. `K` and `V` are those of the state that is worked on;
// of `v` only the first `v_columns` exist and the rest are zero (which is how transition matrices are computed).
struct LinearTask {
  Rows q, k, v, g, beta, o;
  int64_t tokens;
  int K, V, v_columns;
  double scale;
  Decay decay;
  bool erases;

  bool normalize;     // divide q and k by their length
  Gate gate;          // what `g` holds
  double rate;        // exp(A_log) of the head
  double bound;       // of the bounded gate, below 0
  const void* bias;   // dt_bias of the head, K numbers (one for a decay per head) of the kernel's type, or null
  double beta_scale;  // where positive: beta = beta_scale * sigmoid(beta)

  // States [K, V] with rows `state_stride` numbers apart, of the kernel's type, here and below.
  const void* initial;  // or null, for zero
  void* final;          // or null
  int64_t state_stride;

  // What the backward pass wants kept, or null: the errors z of every token, and the state before every
  // chunk, `chunk_stride` numbers apart.
  Rows z;
  void* chunk_states;
  int64_t chunk_stride;
};

constexpr int CHUNK = 64;  // tokens that are worked on as matrices
constexpr int BLOCK = 16;  // tokens between which decays are multiplied out pair by pair

constexpr double L2NORM_EPS = 1e-6;

// The gradients of one head of one sequence. The shapes are those of the task's.
struct LinearGradients {
  Rows d_o;             // given
  const void* d_final;  // given, or null
  Rows q, k, v, g, beta;
  void* d_initial;  // or null
  void* d_rate;     // one number: the gradient of A_log; null without a gate
  void* d_bias;     // K numbers (or one), added up over the tokens; null without a gate
};

// What one instruction set has for these operators. `wide` says that the kernels compute in float64 and not in
// float32; `narrow_products` that products may take their factors in bfloat16.
struct LinearKernels {
  int64_t (*forward_scratch)(const LinearTask&, bool wide);
  void (*forward)(const LinearTask&, bool wide, bool narrow_products, char* scratch);
  int64_t (*backward_scratch)(const LinearTask&, bool wide);
  void (*backward)(const LinearTask&, const LinearGradients&, bool wide, bool narrow_products, char* scratch);
  // C[m, n] += A[m, k] B[k, n]; the rows of A are `lda` numbers apart, the others lie without gaps.
  void (*add_product)(int m, int n, int k, const void* A, int lda, const void* B, void* C, bool wide);
};

}  // namespace intarsia
