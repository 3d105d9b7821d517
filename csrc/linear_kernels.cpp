// The linear operators for one instruction set: this file is compiled once for each.
#include "forward.h"

namespace intarsia::INTARSIA_ISA {

namespace {

template <class R>
int64_t forward_bytes(const LinearTask& task) {
  Arena counter;
  Forward<R, Exact<R>>(task, counter);
  return counter.used();
}

template <class R, class Products>
void forward_with(const LinearTask& task, char* scratch) {
  Arena arena(scratch);
  Forward<R, Products>(task, arena).run(task);
}

int64_t forward_scratch(const LinearTask& task, bool wide) {
  return wide ? forward_bytes<double>(task) : forward_bytes<float>(task);
}

void forward(const LinearTask& task, bool wide, bool, char* scratch) {
  wide ? forward_with<double, Exact<double>>(task, scratch) : forward_with<float, Exact<float>>(task, scratch);
}

void add_product(int m, int n, int k, const void* A, const void* B, void* C, bool wide) {
  // Rows of any length: the columns that do not fill a vector are done one by one.
  const auto run = [&](auto* c) {
    using R = __typeof__(+*c);
    const R *a = static_cast<const R*>(A), *b = static_cast<const R*>(B);
    const int whole = n / LANES<R> * LANES<R>;
    if (whole) Exact<R>::product(m, whole, k, {a, k, 1}, b, n, c, n, Into::add);
    for (int i = 0; i < m; i++)
      for (int j = whole; j < n; j++) {
        R x = 0;
        for (int t = 0; t < k; t++) x += a[int64_t(i) * k + t] * b[int64_t(t) * n + j];
        c[int64_t(i) * n + j] += x;
      }
  };
  wide ? run(static_cast<double*>(C)) : run(static_cast<float*>(C));
}

}  // namespace

extern const LinearKernels linear_kernels{forward_scratch, forward, nullptr, nullptr, add_product};

}  // namespace intarsia::INTARSIA_ISA
