#include "softmax.h"

#include <algorithm>

#include "parallel.h"

namespace intarsia {

namespace {

Rows rows_from(const Array& x, int64_t row) {
  if (!x) return {};
  return {x.at(row), x.stride[0] * size_of(x.dtype), x.dtype};
}

// `work` on runs of rows, which depend on the shape alone; `fill` sets the arrays of a run from its first row on.
template <class Fill>
void on_runs(const Array& logits, int threads, void (*work)(const SoftmaxRun&, bool), const Fill& fill) {
  const int64_t rows = logits.shape[0], V = logits.shape[1];
  const int64_t each = std::max<int64_t>(1, SOFTMAX_NUMBERS / V), tasks = (rows + each - 1) / each;
  const bool wide = logits.dtype == Dtype::float64;
  // On few numbers a second thread costs more than it brings.
  const int useful = int(std::min<int64_t>(threads, std::max<int64_t>(1, tasks - 1)));
  parallel(tasks, useful, 0, [&](int64_t i, char*) {
    SoftmaxRun run{};
    const int64_t first = i * each;
    run.count = std::min(each, rows - first), run.V = int(V), run.logits = rows_from(logits, first);
    fill(run, first);
    work(run, wide);
  });
}

}  // namespace

void log_sums(const Array& logits, const Array& log_sum, const SoftmaxKernels& kernels, int threads) {
  on_runs(logits, threads, kernels.log_sums,
          [&](SoftmaxRun& run, int64_t first) { run.log_sum = rows_from(log_sum, first); });
}

void softmax_gradients(const Array& logits, const Array& log_sum, const int64_t* targets, const Array& gradient,
                       const Array& d_logits, const SoftmaxKernels& kernels, int threads) {
  on_runs(logits, threads, kernels.gradients, [&](SoftmaxRun& run, int64_t first) {
    run.log_sum = rows_from(log_sum, first), run.targets = targets + first;
    run.gradient = rows_from(gradient, first), run.d_logits = rows_from(d_logits, first);
  });
}

}  // namespace intarsia
