// The linear operators for one instruction set: this file is compiled once for each.
#include "backward.h"

namespace intarsia::INTARSIA_ISA {

namespace {

template <class Pass>
int64_t scratch_of(const LinearTask& task) {
  Arena counter;
  Pass(task, counter);
  return counter.used();
}

int64_t forward_scratch(const LinearTask& task, bool wide) {
  return wide ? scratch_of<Forward<double, Exact<double>>>(task) : scratch_of<Forward<float, Exact<float>>>(task);
}

void forward(const LinearTask& task, bool wide, bool, char* scratch) {
  Arena arena(scratch);
  wide ? Forward<double, Exact<double>>(task, arena).run(task) : Forward<float, Exact<float>>(task, arena).run(task);
}

int64_t backward_scratch(const LinearTask& task, bool wide) {
  return wide ? scratch_of<Backward<double, Exact<double>>>(task) : scratch_of<Backward<float, Exact<float>>>(task);
}

void backward(const LinearTask& task, const LinearGradients& grads, bool wide, bool, char* scratch) {
  Arena arena(scratch);
  wide ? Backward<double, Exact<double>>(task, arena).run(task, grads)
       : Backward<float, Exact<float>>(task, arena).run(task, grads);
}

void add_product(int m, int n, int k, const void* A, int lda, const void* B, void* C, bool wide) {
  // Rows of any length: the columns that do not fill a vector are done one by one.
  const auto run = [&](auto* c) {
    using R = __typeof__(+*c);
    const R *a = static_cast<const R*>(A), *b = static_cast<const R*>(B);
    const int whole = n / LANES<R> * LANES<R>;
    Arena nothing;
    if (whole) Exact<R>(0, nothing).product(m, whole, k, {a, lda, 1}, b, n, c, n, Into::add);
    for (int i = 0; i < m; i++)
      for (int j = whole; j < n; j++) {
        R x = 0;
        for (int t = 0; t < k; t++) x += a[int64_t(i) * lda + t] * b[int64_t(t) * n + j];
        c[int64_t(i) * n + j] += x;
      }
  };
  wide ? run(static_cast<double*>(C)) : run(static_cast<float*>(C));
}

}  // namespace

extern const LinearKernels linear_kernels{forward_scratch, forward, backward_scratch, backward, add_product};

}  // namespace intarsia::INTARSIA_ISA
