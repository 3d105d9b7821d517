// Products with few rows over whole tensors.
#pragma once

#include <vector>

#include "array.h"
#include "few_rows_task.h"

namespace intarsia {

// y [R, N] = x [R, K] Wᵀ + bias. There may be several matrices W, `weights`; row i is multiplied with number
// `matrix_of_row[i]`, and those of which no row is there are not read.
struct FewRowsCall {
  FewRowsForm form;
  const std::vector<FewRowsWeights>& weights;
  Array x, y;
  const int64_t* matrix_of_row;  // [R], or null where there is one matrix
  const float* bias;             // [N], of every matrix; or null
};

void few_rows(const FewRowsCall& call, const FewRowsKernels& kernels, int threads);

// `to` [rows, K] bfloat16 = rows `first` .. of one matrix of integers. For many rows of x, which are multiplied faster
// by products of whole matrices than here, some rows of weights at a time.
void unpack_rows(const FewRowsForm& form, const FewRowsWeights& weights, int64_t first, const Array& to,
                 const FewRowsKernels& kernels, int threads);

}  // namespace intarsia
