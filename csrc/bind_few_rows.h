// Packed weights as Python holds them.
#pragma once

#include "bindings.h"
#include "few_rows.h"

namespace intarsia {

// Matrices [E, N, K], whose memory stays its owners'.
struct FewRowsMatrices {
  FewRowsForm form{};
  std::vector<FewRowsWeights> weights;
  std::vector<nb::object> owners;
  const FewRowsKernels& kernels;
};

}  // namespace intarsia
