// The gated RMSNorm for one instruction set: this file is compiled once for each.
//
//   n = o / sqrt(mean(o²) + eps)        y = weight n gate(z)        gate(z) = 1, sigmoid(z) or z sigmoid(z)
#include "borrowed_rows.h"
#include "gates.h"
#include "norm_task.h"

namespace intarsia::INTARSIA_ISA {

namespace {

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class R>
struct Norm {
  const NormSettings& settings;
  int V, width;  // width: V in whole vectors
  R *weight, *o, *z, *d_y, *out, *out_z;

  Norm(const NormSettings& settings, Arena& arena)
      : settings(settings),
        V(settings.V),
        width(whole_vectors<R>(V)),
        weight(arena.take<R>(width)),
        o(arena.take<R>(width)),
        z(arena.take<R>(width)),
        d_y(arena.take<R>(width)),
        out(arena.take<R>(width)),
        out_z(arena.take<R>(width)) {}

  void read_weight() { read_row(settings.weight, 0, weight, V, width); }

  // One over the root of the mean square.
  INLINE R inverse_rms(const R* row) const {
    Vec<R> squares[4] = {};
    int d = 0;
    for (; d + 4 * LANES<R> <= width; d += 4 * LANES<R>)
      for (int i = 0; i < 4; i++) {
        const Vec<R> x = load(row + d + i * LANES<R>);
        squares[i] += x * x;
      }
    for (; d < width; d += LANES<R>) {
      const Vec<R> x = load(row + d);
      squares[0] += x * x;
    }
    const R mean = sum<R>((squares[0] + squares[1]) + (squares[2] + squares[3])) / R(V);
    return R(1) / square_root(mean + R(settings.eps));
  }

  template <OutputGate GATE>
  void forward(const NormRun& run) {
    for (int64_t i = 0; i < run.count; i++) {
      const R* from = borrow_row(run.o, i, o, V);
      const R* gate = GATE == OutputGate::none ? nullptr : borrow_row(run.z, i, z, V);
      R* to = room_for_row(run.y, i, out, V);
      const R inverse = inverse_rms(from);
      for (int d = 0; d < width; d += LANES<R>) {
        Vec<R> y = load(from + d) * inverse * load(weight + d);
        if constexpr (GATE != OutputGate::none) {
          const Vec<R> raw = load(gate + d);
          y *= GATE == OutputGate::sigmoid ? sigmoid<R>(raw) : raw * sigmoid<R>(raw);
        }
        store<R>(to + d, y);
      }
      return_row(run.y, i, to, V);
    }
  }

  // With u = d_y weight gate(z), the gradient of n:  d_o = (u - n mean(u n)) / rms.
  template <OutputGate GATE>
  void backward(const NormRun& run, R* d_weight) {
    for (int64_t i = 0; i < run.count; i++) {
      const R *from = borrow_row(run.o, i, o, V), *given = borrow_row(run.d_y, i, d_y, V);
      const R* gate = GATE == OutputGate::none ? nullptr : borrow_row(run.z, i, z, V);
      R* d_z = GATE == OutputGate::none ? nullptr : room_for_row(run.d_z, i, out_z, V);
      R* d_o = room_for_row(run.d_o, i, out, V);
      const R inverse = inverse_rms(from);
      Vec<R> along{};  // the sum of u n
      for (int d = 0; d < width; d += LANES<R>) {
        const Vec<R> n = load(from + d) * inverse, g = load(given + d), w = load(weight + d);
        Vec<R> gated = g;
        if constexpr (GATE != OutputGate::none) {
          const Vec<R> raw = load(gate + d);
          const Sigmoid<R> s(raw);
          const bool swish = GATE == OutputGate::swish;
          gated *= swish ? raw * s.value : s.value;
          store<R>(d_z + d, g * n * w * (swish ? silu_derivative<R>(raw, s) : s.derivative()));
        }
        store<R>(d_weight + d, load(d_weight + d) + gated * n);
        const Vec<R> u = gated * w;
        along += u * n;
        store<R>(d_o + d, u);
      }
      const R mean = sum<R>(along) / R(V);
      for (int d = 0; d < width; d += LANES<R>)
        store<R>(d_o + d, (load(d_o + d) - load(from + d) * inverse * mean) * inverse);
      return_row(run.d_o, i, d_o, V);
      if constexpr (GATE != OutputGate::none) return_row(run.d_z, i, d_z, V);
    }
  }

  void forward(const NormRun& run) {
    switch (settings.gate) {
      case OutputGate::none: return forward<OutputGate::none>(run);
      case OutputGate::sigmoid: return forward<OutputGate::sigmoid>(run);
      case OutputGate::swish: return forward<OutputGate::swish>(run);
    }
  }
  void backward(const NormRun& run, R* d_weight) {
    switch (settings.gate) {
      case OutputGate::none: return backward<OutputGate::none>(run, d_weight);
      case OutputGate::sigmoid: return backward<OutputGate::sigmoid>(run, d_weight);
      case OutputGate::swish: return backward<OutputGate::swish>(run, d_weight);
    }
  }
};

template <class R>
void forward_in(const NormSettings& settings, const NormRun* runs, int64_t count, char* scratch) {
  Arena arena(scratch);
  Norm<R> norm(settings, arena);
  norm.read_weight();
  for (int64_t i = 0; i < count; i++) norm.forward(runs[i]);
}

template <class R>
void backward_in(const NormSettings& settings, const NormRun* runs, int64_t count, R* d_weight, char* scratch) {
  Arena arena(scratch);
  Norm<R> norm(settings, arena);
  norm.read_weight();
  zero(d_weight, norm.width);
  for (int64_t i = 0; i < count; i++) norm.backward(runs[i], d_weight);
}

template <class R>
void add_weights_in(const NormSettings& settings, const R* sums, int64_t count, const Rows& d_weight, char* scratch) {
  Arena arena(scratch);
  Norm<R> norm(settings, arena);
  add_rows(sums, count, norm.width, norm.width, norm.out);
  write_row(d_weight, 0, norm.out, norm.V);
}

int64_t scratch(const NormSettings& settings, bool wide) {
  Arena counter;
  wide ? void(Norm<double>(settings, counter)) : void(Norm<float>(settings, counter));
  return counter.used();
}

int64_t sum_length(const NormSettings& settings, bool wide) {
  return wide ? whole_vectors<double>(settings.V) : whole_vectors<float>(settings.V);
}

void forward(const NormSettings& settings, const NormRun* runs, int64_t count, bool wide, char* scratch) {
  wide ? forward_in<double>(settings, runs, count, scratch) : forward_in<float>(settings, runs, count, scratch);
}

void backward(const NormSettings& settings, const NormRun* runs, int64_t count, void* d_weight, bool wide,
              char* scratch) {
  wide ? backward_in(settings, runs, count, static_cast<double*>(d_weight), scratch)
       : backward_in(settings, runs, count, static_cast<float*>(d_weight), scratch);
}

void add_weights(const NormSettings& settings, const void* sums, int64_t count, const Rows& d_weight, bool wide,
                 char* scratch) {
  wide ? add_weights_in(settings, static_cast<const double*>(sums), count, d_weight, scratch)
       : add_weights_in(settings, static_cast<const float*>(sums), count, d_weight, scratch);
}

}  // namespace

extern const NormKernels norm_kernels{scratch, sum_length, forward, backward, add_weights};

}  // namespace intarsia::INTARSIA_ISA
