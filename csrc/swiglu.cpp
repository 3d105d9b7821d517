#include "swiglu.h"

#include <algorithm>

#include "parallel.h"

namespace intarsia {

namespace {

Rows rows_from(const Array& x, int64_t row) { return {x.at(row), x.stride[0] * size_of(x.dtype), x.dtype}; }

// `work` on runs of rows; `fill` sets the arrays of a run from its first row on.
template <class Fill>
void on_runs(const Array& gate, int threads, void (*work)(const SwigluRun&, bool), const Fill& fill) {
  const int64_t rows = gate.shape[0], width = gate.shape[1];
  const int64_t each = std::max<int64_t>(1, SWIGLU_NUMBERS / width), tasks = (rows + each - 1) / each;
  // On few numbers a second thread costs more than it brings.
  const int useful = int(std::min<int64_t>(threads, std::max<int64_t>(1, tasks - 1)));
  parallel(tasks, useful, 0, [&](int64_t i, char*) {
    SwigluRun run{};
    const int64_t first = i * each;
    run.width = int(width), run.count = std::min(each, rows - first);
    fill(run, first);
    work(run, gate.dtype == Dtype::float64);
  });
}

}  // namespace

void swiglu_forward(const Array& gate, const Array& up, const Array& y, const SwigluKernels& kernels, int threads) {
  on_runs(gate, threads, kernels.forward, [&](SwigluRun& run, int64_t first) {
    run.gate = rows_from(gate, first), run.up = rows_from(up, first), run.y = rows_from(y, first);
  });
}

void swiglu_backward(const Array& gate, const Array& up, const Array& d_y, const Array& d_gate, const Array& d_up,
                     const SwigluKernels& kernels, int threads) {
  on_runs(gate, threads, kernels.backward, [&](SwigluRun& run, int64_t first) {
    run.gate = rows_from(gate, first), run.up = rows_from(up, first), run.d_y = rows_from(d_y, first);
    run.d_gate = rows_from(d_gate, first), run.d_up = rows_from(d_up, first);
  });
}

}  // namespace intarsia
