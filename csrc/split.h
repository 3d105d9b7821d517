// How the forward pass over sequences and heads is shared out among threads.
#pragma once

#include <vector>

#include "linear_task.h"

namespace intarsia {

// Where there are fewer tasks than threads, tasks are cut into slices of the state's columns, which are independent of
// each other, or into segments of time:
//
//   S' = M S + B          what a segment makes of the state, for every S
//
// B and M are the states that the segment ends with when it begins with 0 and with the identity and, for M, has no
// values. All segments compute theirs side by side, then the states between them follow, and then the outputs. Nothing
// is left out, so the result is the same but for rounding.
void run_forward(const std::vector<LinearTask>& tasks, const LinearKernels& kernels, bool wide, bool narrow,
                 int threads);

}  // namespace intarsia
