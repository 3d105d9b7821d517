// The gated activation of feed-forwards for one instruction set: this file is compiled once for each.
//
//   y = silu(gate) up        silu(x) = x sigmoid(x)
#include "borrowed_rows.h"
#include "gates.h"
#include "swiglu_task.h"

namespace intarsia::INTARSIA_ISA {

namespace {

template <class S>
INLINE S* row_of(const Rows& rows, int64_t i) {
  return reinterpret_cast<S*>(rows.data + i * rows.stride);
}

template <class R>
struct Gradients {
  Vec<R> gate, up;
};
template <class R>
INLINE Gradients<R> gradients_of(Vec<R> gate, Vec<R> up, Vec<R> d_y) {
  const Sigmoid<R> s(gate);
  return {d_y * up * silu_derivative<R>(gate, s), d_y * (gate * s.value)};
}

template <class R, class S>
void forward_in(const SwigluRun& run) {
  constexpr int N = LANES<R>;
  for (int64_t i = 0; i < run.count; i++) {
    const S *gate = row_of<S>(run.gate, i), *up = row_of<S>(run.up, i);
    S* y = row_of<S>(run.y, i);
    int d = 0;
    for (; d + N <= run.width; d += N) store_as<R>(y + d, silu<R>(load_as<R>(gate + d)) * load_as<R>(up + d));
    if (const int rest = run.width - d) {
      const Vec<R> last = silu<R>(load_last<R>(gate + d, rest, R(0))) * load_last<R>(up + d, rest, R(0));
      for (int j = 0; j < rest; j++) store_number(y + d + j, R(last[j]));
    }
  }
}

template <class R, class S>
void backward_in(const SwigluRun& run) {
  constexpr int N = LANES<R>;
  for (int64_t i = 0; i < run.count; i++) {
    const S *gate = row_of<S>(run.gate, i), *up = row_of<S>(run.up, i), *d_y = row_of<S>(run.d_y, i);
    S *d_gate = row_of<S>(run.d_gate, i), *d_up = row_of<S>(run.d_up, i);
    int d = 0;
    for (; d + N <= run.width; d += N) {
      const auto found = gradients_of<R>(load_as<R>(gate + d), load_as<R>(up + d), load_as<R>(d_y + d));
      store_as<R>(d_gate + d, found.gate);
      store_as<R>(d_up + d, found.up);
    }
    if (const int rest = run.width - d) {
      const auto found = gradients_of<R>(load_last<R>(gate + d, rest, R(0)), load_last<R>(up + d, rest, R(0)),
                                         load_last<R>(d_y + d, rest, R(0)));
      for (int j = 0; j < rest; j++) {
        store_number(d_gate + d + j, R(found.gate[j]));
        store_number(d_up + d + j, R(found.up[j]));
      }
    }
  }
}

bool is_narrow(const SwigluRun& run) { return run.gate.dtype == Dtype::bfloat16; }

void forward(const SwigluRun& run, bool wide) {
  if (wide) return forward_in<double, double>(run);
  is_narrow(run) ? forward_in<float, uint16_t>(run) : forward_in<float, float>(run);
}

void backward(const SwigluRun& run, bool wide) {
  if (wide) return backward_in<double, double>(run);
  is_narrow(run) ? backward_in<float, uint16_t>(run) : backward_in<float, float>(run);
}

}  // namespace

extern const SwigluKernels swiglu_kernels{forward, backward};

}  // namespace intarsia::INTARSIA_ISA
