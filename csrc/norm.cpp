#include "norm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"

namespace intarsia {

namespace {

// All rows, and how many of them a task works on. It depends on the shape alone.
struct Split {
  int64_t rows, each;

  explicit Split(const Array& o)
      : rows(o.shape[0] * o.shape[1] * o.shape[2]), each(std::max<int64_t>(1, NORM_NUMBERS / o.shape[3])) {}
  int64_t tasks() const { return (rows + each - 1) / each; }
  // On few numbers a second thread costs more than it brings.
  int useful_threads(int threads) const { return int(std::min<int64_t>(threads, std::max<int64_t>(1, tasks() - 1))); }
};

Rows rows_of(const Array& x, int64_t a, int64_t b, int64_t c) {
  if (!x) return {};
  return {x.at(a, b, c), x.stride[2] * size_of(x.dtype), x.dtype};
}

// Whether dimension 1 continues dimension 2, so that both are one run of rows.
bool continues(const Array& x) { return !x || x.stride[1] == x.shape[2] * x.stride[2]; }

// The rows of one task as runs of rows with one distance; `fill` sets the arrays of a run.
template <class Fill>
std::vector<NormRun> runs_of(const Array& o, const Split& split, int64_t task, bool joined, const Fill& fill) {
  std::vector<NormRun> runs;
  const int64_t B = o.shape[1], C = o.shape[2], inner = joined ? B * C : C;
  const int64_t last = std::min((task + 1) * split.each, split.rows);
  for (int64_t row = task * split.each; row < last;) {
    const int64_t count = std::min(inner - row % inner, last - row);
    NormRun& run = runs.emplace_back();
    run.count = count;
    fill(run, [&](const Array& x) { return rows_of(x, row / (B * C), row / C % B, row % C); });
    row += count;
  }
  return runs;
}

NormSettings settings_of(const NormCall& call) {
  return {{call.weight.data, 0, call.weight.dtype}, int(call.o.shape[3]), call.eps, call.gate};
}

bool is_wide(const NormCall& call) { return call.o.dtype == Dtype::float64; }

}  // namespace

void norm_forward(const NormCall& call, const Array& y, const NormKernels& kernels, int threads) {
  const bool wide = is_wide(call), joined = continues(call.o) && continues(call.z) && continues(y);
  const Split split(call.o);
  const NormSettings settings = settings_of(call);
  parallel(split.tasks(), split.useful_threads(threads), kernels.scratch(settings, wide),
           [&](int64_t i, char* scratch) {
             const std::vector<NormRun> runs = runs_of(call.o, split, i, joined, [&](NormRun& run, const auto& rows) {
               run.o = rows(call.o), run.z = rows(call.z), run.y = rows(y);
             });
             kernels.forward(settings, runs.data(), int64_t(runs.size()), wide, scratch);
           });
}

void norm_backward(const NormCall& call, const NormGradientArrays& grads, const NormKernels& kernels, int threads) {
  const bool wide = is_wide(call), joined = continues(call.o) && continues(call.z) && continues(grads.d_y) &&
                                            continues(grads.o) && continues(grads.z);
  const Split split(call.o);
  const NormSettings settings = settings_of(call);
  const int64_t bytes = kernels.sum_length(settings, wide) * (wide ? 8 : 4);
  const int64_t scratch_bytes = kernels.scratch(settings, wide);
  // The gradient of the weight, of each task.
  const std::unique_ptr<char[]> sums(new char[size_t(split.tasks() * bytes)]);
  parallel(split.tasks(), split.useful_threads(threads), scratch_bytes, [&](int64_t i, char* scratch) {
    const std::vector<NormRun> runs = runs_of(call.o, split, i, joined, [&](NormRun& run, const auto& rows) {
      run.o = rows(call.o), run.z = rows(call.z), run.d_y = rows(grads.d_y);
      run.d_o = rows(grads.o), run.d_z = rows(grads.z);
    });
    kernels.backward(settings, runs.data(), int64_t(runs.size()), sums.get() + i * bytes, wide, scratch);
  });
  parallel(1, 1, scratch_bytes, [&](int64_t, char* scratch) {
    kernels.add_weights(settings, sums.get(), split.tasks(), {grads.weight.data, 0, grads.weight.dtype}, wide, scratch);
  });
}

}  // namespace intarsia
