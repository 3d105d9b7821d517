// The linear operators for processors that multiply bfloat16: this file is compiled once for each way of doing so.
// Only what differs from AVX-512 is here.
#include "backward.h"
#include "narrow.h"

namespace intarsia {

namespace avx512 {
extern const LinearKernels linear_kernels;
}

namespace INTARSIA_ISA {

namespace {

#ifndef INTARSIA_TILES
struct TileRegisters {
  TileRegisters() {}
};
#endif

const LinearKernels& exact() { return avx512::linear_kernels; }

int64_t forward_scratch(const LinearTask& task, bool wide) {
  if (wide) return exact().forward_scratch(task, wide);
  Arena counter;
  Forward<float, Narrow>(task, counter);
  return counter.used();
}

void forward(const LinearTask& task, bool wide, bool narrow, char* scratch) {
  if (wide || !narrow) return exact().forward(task, wide, narrow, scratch);
  const TileRegisters registers;
  Arena arena(scratch);
  Forward<float, Narrow>(task, arena).run(task);
}

int64_t backward_scratch(const LinearTask& task, bool wide) {
  if (wide) return exact().backward_scratch(task, wide);
  Arena counter;
  Backward<float, Narrow>(task, counter);
  return counter.used();
}

void backward(const LinearTask& task, const LinearGradients& grads, bool wide, bool narrow, char* scratch) {
  if (wide || !narrow) return exact().backward(task, grads, wide, narrow, scratch);
  const TileRegisters registers;
  Arena arena(scratch);
  Backward<float, Narrow>(task, arena).run(task, grads);
}

void add_product(int m, int n, int k, const void* A, int lda, const void* B, void* C, bool wide) {
  exact().add_product(m, n, k, A, lda, B, C, wide);
}

}  // namespace

extern const LinearKernels linear_kernels{forward_scratch, forward, backward_scratch, backward, add_product};

}  // namespace INTARSIA_ISA

}  // namespace intarsia
