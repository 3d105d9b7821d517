// The short causal convolution for one instruction set: this file is compiled once for each.
//
//   p_t = sum_w weight_w x_{t - W + 1 + w}        y_t = p_t or silu(p_t)
//
// A block of channels is walked along token by token. The last W rows of x (and, backward, of the gradient of p) are
// at hand in a window; a row is converted once, when it enters.
#include "borrowed_rows.h"
#include "conv_task.h"
#include "gates.h"

namespace intarsia::INTARSIA_ISA {

namespace {

// The last W rows, the newest last: pointers to the rows themselves or to the window's own buffers.
template <class R>
struct Window {
  int W, width;
  const R** rows;
  R* buffers;

  Window(int W, int width, Arena& arena) : W(W), width(width) {
    rows = arena.take<const R*>(W);
    buffers = arena.take<R>(int64_t(W) * width);
  }
  // The buffer of the row at a place, which may be as low as 1 - W; it is free once that row has left the window.
  INLINE R* buffer(int64_t place) const { return buffers + (place + W) % W * width; }
  INLINE void push(const R* row) {
    for (int w = 0; w + 1 < W; w++) rows[w] = rows[w + 1];
    rows[W - 1] = row;
  }
};

// With 0 for `TAPS` their number is known at run time only.
template <class R, int TAPS>
struct Convolution {
  using Number = R;
  const ConvBlock& block;
  int W, width;
  R* weight;       // [W, width]
  R* by_channel;   // buffer: numbers of each channel side by side, as weights and states have them
  R *row, *zeros;  // [width]
  R* d_final;      // [W - 1, width]
  Window<R> x, d_p;
  R* d_past;  // [W - 1, width]

  Convolution(const ConvBlock& block, Arena& arena)
      : block(block),
        W(TAPS ? TAPS : block.W),
        width(whole_vectors<R>(block.channels)),
        weight(arena.take<R>(int64_t(W) * width)),
        by_channel(arena.take<R>(int64_t(W) * width)),
        row(arena.take<R>(width)),
        zeros(arena.take<R>(width)),
        d_final(arena.take<R>(int64_t(W) * width)),
        x(W, width, arena),
        d_p(W, width, arena),
        d_past(arena.take<R>(int64_t(W) * width)) {}

  void read_weight() {
    read_columns(block.weight, W, weight);
    zero(zeros, width);
  }

  // [channels, count] to `count` rows; zero where there is nothing to read.
  INLINE void read_columns(const Rows& from, int count, R* to) {
    zero(to, int64_t(count) * width);
    if (!from || count == 0) return;
    read_row(from, 0, by_channel, block.channels * count, block.channels * count);
    for (int i = 0; i < count; i++)
      for (int c = 0; c < block.channels; c++) to[i * width + c] = by_channel[c * count + i];
  }
  INLINE void write_columns(const R* const* rows, int count, const Rows& to) {
    if (count == 0) return;
    for (int i = 0; i < count; i++)
      for (int c = 0; c < block.channels; c++) by_channel[c * count + i] = rows[i][c];
    write_row(to, 0, by_channel, block.channels * count);
  }

  // Fill the window with the W - 1 rows before the run's first.
  void enter(const ConvRun& run) {
    if (run.first < W - 1) read_columns(run.initial, W - 1, d_past);  // as a buffer
    for (int64_t t = run.first - (W - 1); t < run.first; t++) {
      if (t < 0) {
        copy(x.buffer(t), d_past + (t + W - 1) * width, width);
        x.push(x.buffer(t));
      } else {
        push_x(run, t);
      }
    }
  }
  INLINE void push_x(const ConvRun& run, int64_t t) { x.push(borrow_row(run.x, t, x.buffer(t), block.channels)); }

  // p at the channels from d on.
  INLINE Vec<R> convolved(int d) const {
    Vec<R> p = load(x.rows[0] + d) * load(weight + d);
    for (int w = 1; w < (TAPS ? TAPS : W); w++) p += load(x.rows[w] + d) * load(weight + w * width + d);
    return p;
  }

  void forward(const ConvRun& run) {
    enter(run);
    for (int64_t t = run.first; t < run.last; t++) {
      push_x(run, t);
      R* y = room_for_row(run.y, t, row, block.channels);
      if (block.silu)
        for (int d = 0; d < width; d += LANES<R>) {
          const Vec<R> p = convolved(d);
          store<R>(y + d, p * sigmoid<R>(p));
        }
      else
        for (int d = 0; d < width; d += LANES<R>) store<R>(y + d, convolved(d));
      return_row(run.y, t, y, block.channels);
    }
    if (run.final && run.last == run.tokens) write_columns(x.rows + 1, W - 1, run.final);
  }

  // The gradient of p_t, and what it adds to that of the weights.
  INLINE void differentiate(const ConvRun& run, int64_t t, R* d_weight) {
    push_x(run, t);
    const R* d_y = borrow_row(run.d_y, t, row, block.channels);
    R* out = d_p.buffer(t);
    for (int d = 0; d < width; d += LANES<R>) {
      Vec<R> g = load(d_y + d);
      if (block.silu) {
        const Vec<R> p = convolved(d);
        g *= silu_derivative<R>(p, Sigmoid<R>(p));
      }
      store<R>(out + d, g);
      if (d_weight)
        for (int w = 0; w < (TAPS ? TAPS : W); w++) {
          R* sum = d_weight + w * width + d;
          store<R>(sum, load(sum) + g * load(x.rows[w] + d));
        }
    }
    d_p.push(out);
  }

  // The gradient of the row at `place`, when those of the W rows of p that it acts on are in the window.
  INLINE void spread(const ConvRun& run, int64_t place) {
    R* out = place < 0 ? d_past + (place + W - 1) * width : room_for_row(run.d_x, place, row, block.channels);
    for (int d = 0; d < width; d += LANES<R>) {
      Vec<R> sum = load(d_p.rows[0] + d) * load(weight + (W - 1) * width + d);
      for (int w = 1; w < (TAPS ? TAPS : W); w++) sum += load(d_p.rows[w] + d) * load(weight + (W - 1 - w) * width + d);
      store<R>(out + d, sum);
    }
    const int64_t in_final = place - (run.tokens - (W - 1));
    if (run.d_final && in_final >= 0)
      for (int d = 0; d < width; d += LANES<R>) store<R>(out + d, load(out + d) + load(d_final + in_final * width + d));
    if (place >= 0) return_row(run.d_x, place, out, block.channels);
  }

  void backward(const ConvRun& run, R* d_weight) {
    enter(run);
    if (run.d_final && run.last > run.tokens - (W - 1)) read_columns(run.d_final, W - 1, d_final);
    for (int w = 0; w < W; w++) d_p.push(zeros);
    // The rows of x that this run gives the gradient of lie W - 1 tokens back, so it looks as far into what follows.
    const int64_t lowest = run.first > 0 ? run.first : run.d_initial ? 1 - W : 0;
    for (int64_t t = run.first; t < run.last + W - 1; t++) {
      if (t < run.tokens)
        differentiate(run, t, t < run.last ? d_weight : nullptr);
      else
        d_p.push(zeros);
      if (t - (W - 1) >= lowest) spread(run, t - (W - 1));
    }
    if (run.d_initial && run.first == 0) {
      const R** past = d_p.rows;  // of no more use to the window
      for (int i = 0; i + 1 < W; i++) past[i] = d_past + i * width;
      write_columns(past, W - 1, run.d_initial);
    }
  }

  void add_weights(const R* sums, int64_t count, int64_t stride, const Rows& d_weight) {
    add_rows(sums, count, stride, W * width, weight);
    const R** taps = x.rows;
    for (int w = 0; w < W; w++) taps[w] = weight + w * width;
    write_columns(taps, W, d_weight);
  }
};

// Calls `use(type)` with a null pointer of the convolution's type for this block.
template <class Use>
void with_type(const ConvBlock& block, bool wide, const Use& use) {
  const auto with_taps = [&]<class R>(R*) {
    switch (block.W) {
      case 2: return use(static_cast<Convolution<R, 2>*>(nullptr));
      case 3: return use(static_cast<Convolution<R, 3>*>(nullptr));
      case 4: return use(static_cast<Convolution<R, 4>*>(nullptr));
      default: return use(static_cast<Convolution<R, 0>*>(nullptr));
    }
  };
  wide ? with_taps(static_cast<double*>(nullptr)) : with_taps(static_cast<float*>(nullptr));
}

int64_t scratch(const ConvBlock& block, bool wide) {
  Arena counter;
  with_type(block, wide, [&]<class C>(C*) { C convolution(block, counter); });
  return counter.used();
}

void forward(const ConvBlock& block, const ConvRun* runs, int64_t count, bool wide, char* scratch) {
  with_type(block, wide, [&]<class C>(C*) {
    Arena arena(scratch);
    C convolution(block, arena);
    convolution.read_weight();
    for (int64_t i = 0; i < count; i++) convolution.forward(runs[i]);
  });
}

void backward(const ConvBlock& block, const ConvRun* runs, int64_t count, void* d_weight, bool wide, char* scratch) {
  with_type(block, wide, [&]<class C>(C*) {
    Arena arena(scratch);
    C convolution(block, arena);
    auto* sums = static_cast<typename C::Number*>(d_weight);
    convolution.read_weight();
    zero(sums, int64_t(convolution.W) * convolution.width);
    for (int64_t i = 0; i < count; i++) convolution.backward(runs[i], sums);
  });
}

void add_weights(const ConvBlock& block, const void* sums, int64_t count, int64_t stride, const Rows& d_weight,
                 bool wide, char* scratch) {
  with_type(block, wide, [&]<class C>(C*) {
    Arena arena(scratch);
    C convolution(block, arena);
    convolution.add_weights(static_cast<const typename C::Number*>(sums), count, stride, d_weight);
  });
}

}  // namespace

extern const ConvKernels conv_kernels{scratch, forward, backward, add_weights};

}  // namespace intarsia::INTARSIA_ISA
