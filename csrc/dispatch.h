// Which instruction sets this machine has, and the one that is used.
#pragma once

#include <string>
#include <vector>

#include "attend_task.h"
#include "conv_task.h"
#include "decode_task.h"
#include "few_rows_task.h"
#include "gathered_task.h"
#include "linear_task.h"
#include "norm_task.h"
#include "pick_task.h"
#include "row_task.h"
#include "softmax_task.h"
#include "swiglu_task.h"

namespace intarsia {

// All kernels of one instruction set.
struct Kernels {
  const char* name;
  const LinearKernels& linear;
  const ConvKernels& conv;
  const NormKernels& norm;
  const DecodeKernels& decode;
  const FewRowsKernels& few_rows;
  const AttendKernels& attend;
  const SoftmaxKernels& softmax;
  const RowKernels& row;
  const SwigluKernels& swiglu;
  const PickKernels& pick;
  const GatheredKernels& gathered;
};

// The instruction sets that were compiled in and that this machine can run, the best first.
std::vector<std::string> available();

// Who made this processor, in the twelve letters that it has for that ("GenuineIntel"), or nothing where it has none.
std::string maker();

// The kernels of one of them. Throws std::invalid_argument for a name that is unknown or cannot run here.
const Kernels& kernels_of(const std::string& name);

}  // namespace intarsia
