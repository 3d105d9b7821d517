// The softmax over rows of logits for one instruction set: this file is compiled once for each.
#include "borrowed_rows.h"
#include "softmax_task.h"

namespace intarsia::INTARSIA_ISA {

namespace {

INLINE float logarithm(float x) { return __builtin_logf(x); }
INLINE double logarithm(double x) { return __builtin_log(x); }
INLINE bool is_finite(float x) { return __builtin_isfinite(x); }
INLINE bool is_finite(double x) { return __builtin_isfinite(x); }

template <class R>
INLINE R largest(Vec<R> v) {
  R top = v[0];
  for (int i = 1; i < LANES<R>; i++) top = v[i] > top ? v[i] : top;
  return top;
}

constexpr int CHAINS = 4;  // of sums beside each other: an addition takes as many cycles

// The sum of `term` over all vectors of a row, whose last one is filled up with -inf.
template <class R, class S, class Step>
INLINE void over_row(const S* row, int V, const Step& step) {
  constexpr int N = LANES<R>;
  int d = 0;
  for (; d + CHAINS * N <= V; d += CHAINS * N)
    for (int i = 0; i < CHAINS; i++) step(i, load_as<R>(row + d + i * N));
  for (; d + N <= V; d += N) step(0, load_as<R>(row + d));
  if (d < V) step(0, load_last<R>(row + d, V - d, R(-__builtin_inf())));
}

template <class R, class S>
INLINE R log_sum_of(const S* row, int V) {
  Vec<R> tops[CHAINS], sums[CHAINS] = {};
  for (Vec<R>& top : tops) top = splat(R(-__builtin_inf()));
  over_row<R>(row, V, [&](int i, Vec<R> x) { tops[i] = x > tops[i] ? x : tops[i]; });
  R top = largest<R>(tops[0]);
  for (int i = 1; i < CHAINS; i++) {
    const R other = largest<R>(tops[i]);
    top = other > top ? other : top;
  }
  // Infinite logits: nothing is subtracted from them, and the sum is 0 or infinite, as it should be.
  if (!is_finite(top)) top = 0;
  over_row<R>(row, V, [&](int i, Vec<R> x) { sums[i] += exp<R>(x - top); });
  return top + logarithm(sum<R>((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

template <class R, class S>
INLINE void gradient_of(const S* row, int V, R log_sum, int64_t target, R gradient, S* out) {
  constexpr int N = LANES<R>;
  int d = 0;
  for (; d + N <= V; d += N) store_as<R>(out + d, exp<R>(load_as<R>(row + d) - log_sum) * gradient);
  if (d < V) {
    const Vec<R> last = exp<R>(load_last<R>(row + d, V - d, R(0)) - log_sum) * gradient;
    for (int i = 0; d + i < V; i++) store_number(out + d + i, R(last[i]));
  }
  if (target >= 0 && target < V) {
    const Vec<R> likelihood = exp<R>(splat(number_as<R>(row[target])) - log_sum);
    store_number(out + target, R((likelihood[0] - R(1)) * gradient));
  }
}

template <class R, class S>
void log_sums_in(const SoftmaxRun& run) {
  for (int64_t i = 0; i < run.count; i++) {
    const S* row = reinterpret_cast<const S*>(run.logits.data + i * run.logits.stride);
    write_number<R>(run.log_sum, i, log_sum_of<R>(row, run.V));
  }
}

template <class R, class S>
void gradients_in(const SoftmaxRun& run) {
  for (int64_t i = 0; i < run.count; i++) {
    const S* row = reinterpret_cast<const S*>(run.logits.data + i * run.logits.stride);
    S* out = reinterpret_cast<S*>(run.d_logits.data + i * run.d_logits.stride);
    gradient_of<R>(row, run.V, read_number<R>(run.log_sum, i), run.targets[i], read_number<R>(run.gradient, i), out);
  }
}

bool is_narrow(const SoftmaxRun& run) { return run.logits.dtype == Dtype::bfloat16; }

void log_sums(const SoftmaxRun& run, bool wide) {
  wide             ? log_sums_in<double, double>(run)
  : is_narrow(run) ? log_sums_in<float, uint16_t>(run)
                   : log_sums_in<float, float>(run);
}

void gradients(const SoftmaxRun& run, bool wide) {
  wide             ? gradients_in<double, double>(run)
  : is_narrow(run) ? gradients_in<float, uint16_t>(run)
                   : gradients_in<float, float>(run);
}

}  // namespace

extern const SoftmaxKernels softmax_kernels{log_sums, gradients};

}  // namespace intarsia::INTARSIA_ISA
