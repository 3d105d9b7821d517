// One or a few tokens of many sequences, with the states in pools.
#pragma once

#include "decode_task.h"

namespace intarsia {

// The slots of a pool lie behind each other without gaps: boards [HV, K, V], last inputs [W - 1, channels].
struct DecodePool {
  char *board, *conv;
};

// Rows are tokens, those of a sequence behind each other: sequence n has the tokens `edges[n] .. edges[n + 1] - 1`, its
// state is read from slot `read[n]` of `from` (-1: it begins) and written to slot `write[n]` of `to`. The caller has
// checked the slots: all exist, none is written twice, and none that one sequence writes is read by another.
struct DecodeCall {
  Rows x, g, beta, z, o, a, b;
  int64_t sequences;
  const int64_t *edges, *read, *write;
  DecodePool from, to;
};

// What is computed for a sequence does not depend on the others, nor on how its tokens are shared out over calls.
void decode(const DecodeLayer& layer, const DecodeCall& call, const DecodeKernels& kernels, bool wide, int threads);

}  // namespace intarsia
