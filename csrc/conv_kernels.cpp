// The short causal convolution for one instruction set: this file is compiled once for each.
//
//   p_t = sum_w weight_w x_{t - W + 1 + w}        y_t = p_t or silu(p_t)
//
// A block of channels is walked along, some tokens at a time. The rows of x that they need (and, backward, those of the
// gradient of p) are at hand in a window; a row is converted once, when it enters.
#include "borrowed_rows.h"
#include "conv_task.h"
#include "gates.h"

namespace intarsia::INTARSIA_ISA {

namespace {

// Some last rows, the newest last: pointers to the rows themselves or to the window's own buffers.
template <class R>
struct Window {
  int length, width;
  const R** rows;
  R* buffers;

  Window(int length, int width, Arena& arena)
      : length(length),
        width(width),
        rows(arena.take<const R*>(length)),
        buffers(arena.take<R>(int64_t(length) * width)) {}

  // The buffer of the row at a place, which may be as low as -length; it is free once that row has left the window.
  INLINE R* buffer(int64_t place) const { return buffers + (place + length) % length * width; }
  INLINE void push(const R* row) {
    for (int w = 0; w + 1 < length; w++) rows[w] = rows[w + 1];
    rows[length - 1] = row;
  }
  INLINE const R* const* last(int count) const { return rows + length - count; }
};

// `[channels, count]` to `count` rows, and back. With 0 for COUNT it is known at run time only.
template <int COUNT, class R>
INLINE void to_rows(const R* from, int channels, int count, R* to, int width) {
  if (COUNT) count = COUNT;
  for (int c = 0; c < channels; c++)
    for (int i = 0; i < count; i++) to[i * width + c] = from[c * count + i];
}
template <int COUNT, class R>
INLINE void from_rows(const R* const* rows, int channels, int count, R* to) {
  if (COUNT) count = COUNT;
  for (int c = 0; c < channels; c++)
    for (int i = 0; i < count; i++) to[c * count + i] = rows[i][c];
}

// With 0 for `TAPS` their number is known at run time only. y, d_y and d_x are of type S, x of any.
template <class R, class S, int TAPS>
struct Convolution {
  using Number = R;
  // Tokens at a time: each weight and each row is read once for all of them.
  static constexpr int GROUP = TAPS ? 4 : 1;
  static constexpr int N = LANES<R>;

  const ConvBlock& block;
  int W, width;
  R* weight;      // [W, width]
  R* by_channel;  // buffer: numbers of each channel side by side, as weights have them
  R* rows;        // [GROUP, width]
  R* zeros;       // [width]
  R* d_final;     // [W - 1, width]
  Window<R> x, d_p;
  R* d_past;  // [W - 1, width]

  Convolution(const ConvBlock& block, Arena& arena)
      : block(block),
        W(TAPS ? TAPS : block.W),
        width(padded<R>(block.channels)),
        weight(arena.take<R>(int64_t(W) * width)),
        by_channel(arena.take<R>(int64_t(W) * width)),
        rows(arena.take<R>(GROUP * width)),
        zeros(arena.take<R>(width)),
        d_final(arena.take<R>(int64_t(W) * width)),
        x(W - 1 + GROUP, width, arena),
        d_p(W - 1 + GROUP, width, arena),
        d_past(arena.take<R>(int64_t(W) * width)) {}

  INLINE int taps() const { return TAPS ? TAPS : W; }

  void read_weight() {
    read_row(block.weight, 0, by_channel, block.channels * W, block.channels * W);
    zero(weight, int64_t(W) * width);
    to_rows<TAPS>(by_channel, block.channels, W, weight, width);
    zero(zeros, width);
  }

  // W - 1 rows of a state; zero where there is none.
  INLINE void read_state(const Rows& from, R* to) {
    if (!from) return zero(to, int64_t(W - 1) * width);
    for (int i = 0; i + 1 < W; i++) read_row(from, i, to + i * width, block.channels, width);
  }
  INLINE void write_state(const R* const* from, const Rows& to) {
    for (int i = 0; i + 1 < W; i++) write_row(to, i, from[i], block.channels);
  }

  // Fill the window with the W - 1 rows before the run's first.
  void enter(const ConvRun& run) {
    if (run.first < W - 1) read_state(run.initial, d_past);  // as a buffer
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

  // Rows t .. t + COUNT - 1 will be needed soon.
  template <int COUNT>
  INLINE void fetch(const Rows& from, int64_t t, int64_t end) const {
    const int64_t bytes = block.channels * size_of(from.dtype);
    for (int i = 0; i < COUNT && t + i < end; i++)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from.data + (t + i) * from.stride + at);
  }

  // p of COUNT tokens at the channels from d on. `past`: the W - 1 rows before them, and theirs.
  template <int COUNT>
  INLINE void convolve(const R* const* past, int d, Vec<R>* p) const {
    for (int i = 0; i < COUNT; i++) {
      p[i] = load(past[i] + d) * load(weight + d);
      for (int w = 1; w < taps(); w++) p[i] += load(past[i + w] + d) * load(weight + w * width + d);
    }
  }

  template <int COUNT>
  INLINE void forward(const ConvRun& run, int64_t t) {
    S* y[COUNT];
    for (int i = 0; i < COUNT; i++) {
      push_x(run, t + i);
      y[i] = room_for_row_as<R, S>(run.y, t + i, rows + i * width, block.channels);
    }
    fetch<COUNT>(run.y, t + COUNT, run.last);
    fetch<COUNT>(run.x, t + COUNT, run.last);
    const R* const* past = x.last(taps() - 1 + COUNT);
    for (int d = 0; d < width; d += N) {
      Vec<R> p[COUNT];
      convolve<COUNT>(past, d, p);
      for (int i = 0; i < COUNT; i++) store_as<R>(y[i] + d, block.silu ? silu<R>(p[i]) : p[i]);
    }
    for (int i = 0; i < COUNT; i++) return_row_as<R>(run.y, t + i, y[i], block.channels);
  }

  void forward(const ConvRun& run) {
    enter(run);
    int64_t t = run.first;
    for (; t + GROUP <= run.last; t += GROUP) forward<GROUP>(run, t);
    for (; t < run.last; t++) forward<1>(run, t);
    if (run.final && run.last == run.tokens) write_state(x.last(W - 1), run.final);
  }

  // The gradients of COUNT tokens' p, and what they add to that of the weights.
  template <int COUNT>
  INLINE void differentiate(const ConvRun& run, int64_t t, R* d_weight) {
    const S* d_y[COUNT];
    for (int i = 0; i < COUNT; i++) {
      push_x(run, t + i);
      d_y[i] = borrow_row_as<R, S>(run.d_y, t + i, rows + i * width, block.channels);
    }
    fetch<COUNT>(run.x, t + COUNT, run.last);
    fetch<COUNT>(run.d_y, t + COUNT, run.last);
    const R* const* past = x.last(taps() - 1 + COUNT);
    for (int d = 0; d < width; d += N) {
      Vec<R> p[COUNT] = {}, g[COUNT];
      if (block.silu) convolve<COUNT>(past, d, p);
      for (int i = 0; i < COUNT; i++) {
        g[i] = load_as<R>(d_y[i] + d);
        if (block.silu) g[i] *= silu_derivative<R>(p[i], Sigmoid<R>(p[i]));
        store<R>(d_p.buffer(t + i) + d, g[i]);
      }
      if (d_weight)
        for (int w = 0; w < taps(); w++) {
          Vec<R> sum = load(d_weight + w * width + d);
          for (int i = 0; i < COUNT; i++) sum += g[i] * load(past[i + w] + d);
          store<R>(d_weight + w * width + d, sum);
        }
    }
    for (int i = 0; i < COUNT; i++) d_p.push(d_p.buffer(t + i));
  }

  // The gradients of COUNT rows of x from `place` on. `d_p`: those of the rows of p that they act on.
  template <int COUNT, class To>
  INLINE void spread(const R* const* d_p, To* const* out) const {
    for (int d = 0; d < width; d += N)
      for (int i = 0; i < COUNT; i++) {
        Vec<R> sum = load(d_p[i] + d) * load(weight + (taps() - 1) * width + d);
        for (int w = 1; w < taps(); w++) sum += load(d_p[i + w] + d) * load(weight + (taps() - 1 - w) * width + d);
        store_as<R>(out[i] + d, sum);
      }
  }
  template <int COUNT>
  INLINE void spread_inside(const ConvRun& run, int64_t place, const R* const* d_p) {
    S* out[COUNT];
    for (int i = 0; i < COUNT; i++)
      out[i] = room_for_row_as<R, S>(run.d_x, place + i, rows + i * width, block.channels);
    spread<COUNT>(d_p, out);
    for (int i = 0; i < COUNT; i++) return_row_as<R>(run.d_x, place + i, out[i], block.channels);
  }
  // The same for one row, which may be one of the initial state or may itself be part of the final one.
  INLINE void spread_at_edge(const ConvRun& run, int64_t place, const R* const* d_p) {
    const int64_t in_final = place - (run.tokens - (W - 1));
    if (place >= 0 && !(run.d_final && in_final >= 0)) return spread_inside<1>(run, place, d_p);
    R* out = place < 0 ? d_past + (place + W - 1) * width : rows;
    spread<1>(d_p, &out);
    if (run.d_final && in_final >= 0)
      for (int d = 0; d < width; d += N) store<R>(out + d, load(out + d) + load(d_final + in_final * width + d));
    if (place >= 0) write_row(run.d_x, place, out, block.channels);
  }

  // The gradients of COUNT tokens' p, and with them those of as many rows of x, which lie W - 1 tokens back.
  template <int COUNT>
  INLINE void backward(const ConvRun& run, int64_t t, int64_t lowest, R* d_weight) {
    differentiate<COUNT>(run, t, d_weight);
    const int64_t place = t - (W - 1), inside = lowest > 0 ? lowest : 0;
    const R* const* d = d_p.last(taps() - 1 + COUNT);
    if (place >= inside && (!run.d_final || place + COUNT <= run.tokens - (W - 1)))
      return spread_inside<COUNT>(run, place, d);
    for (int i = 0; i < COUNT; i++)
      if (place + i >= lowest) spread_at_edge(run, place + i, d + i);
  }

  void backward(const ConvRun& run, R* d_weight) {
    enter(run);
    if (run.d_final && run.last > run.tokens - (W - 1)) read_state(run.d_final, d_final);
    for (int w = 0; w < W; w++) d_p.push(zeros);
    const int64_t lowest = run.first > 0 ? run.first : run.d_initial ? 1 - W : 0;
    int64_t t = run.first;
    for (; t + GROUP <= run.last; t += GROUP) backward<GROUP>(run, t, lowest, d_weight);
    for (; t < run.last; t++) backward<1>(run, t, lowest, d_weight);
    // The last rows of x act on the tokens that follow.
    for (; t < run.last + W - 1; t++) {
      if (t < run.tokens)
        differentiate<1>(run, t, nullptr);
      else
        d_p.push(zeros);
      if (t - (W - 1) >= lowest) spread_at_edge(run, t - (W - 1), d_p.last(taps()));
    }
    if (run.d_initial && run.first == 0) {
      const R** past = d_p.rows;  // of no more use to the window
      for (int i = 0; i + 1 < W; i++) past[i] = d_past + i * width;
      write_state(past, run.d_initial);
    }
  }

  void add_weights(const R* sums, int64_t count, int64_t stride, const Rows& d_weight) {
    add_rows(sums, count, stride, W * width, weight);
    for (int w = 0; w < W; w++) x.rows[w] = weight + w * width;
    from_rows<TAPS>(x.rows, block.channels, W, by_channel);
    write_row(d_weight, 0, by_channel, block.channels * W);
  }
};

// Calls `use(type)` with a null pointer of the convolution's type for this block. With `narrow`, all rows are bfloat16
// and fill whole vectors, so that they are used where they lie.
template <class Use>
void with_type(const ConvBlock& block, bool wide, bool narrow, const Use& use) {
  const auto with_taps = [&]<class R, class S>(R*, S*) {
    switch (block.W) {
      case 2: return use(static_cast<Convolution<R, S, 2>*>(nullptr));
      case 3: return use(static_cast<Convolution<R, S, 3>*>(nullptr));
      case 4: return use(static_cast<Convolution<R, S, 4>*>(nullptr));
      default: return use(static_cast<Convolution<R, S, 0>*>(nullptr));
    }
  };
  float* const single = nullptr;
  double* const twice = nullptr;
  uint16_t* const half = nullptr;
  wide ? with_taps(twice, twice) : narrow ? with_taps(single, half) : with_taps(single, single);
}

// Whether all of a task's rows can be used as bfloat16, where they lie.
bool is_narrow(const ConvBlock& block, const ConvRun* runs, int64_t count) {
  if (block.channels % LANES<float>) return false;
  for (int64_t i = 0; i < count; i++) {
    const Rows all[] = {runs[i].y, runs[i].d_y, runs[i].d_x};
    for (const Rows& rows : all)
      if (rows && rows.dtype != Dtype::bfloat16) return false;
  }
  return true;
}

int64_t scratch(const ConvBlock& block, bool wide) {
  Arena counter;
  with_type(block, wide, false, [&]<class C>(C*) { C convolution(block, counter); });
  return counter.used();
}

void forward(const ConvBlock& block, const ConvRun* runs, int64_t count, bool wide, char* scratch) {
  with_type(block, wide, is_narrow(block, runs, count), [&]<class C>(C*) {
    Arena arena(scratch);
    C convolution(block, arena);
    convolution.read_weight();
    for (int64_t i = 0; i < count; i++) convolution.forward(runs[i]);
  });
}

void backward(const ConvBlock& block, const ConvRun* runs, int64_t count, void* d_weight, bool wide, char* scratch) {
  with_type(block, wide, is_narrow(block, runs, count), [&]<class C>(C*) {
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
  with_type(block, wide, false, [&]<class C>(C*) {
    Arena arena(scratch);
    C convolution(block, arena);
    convolution.add_weights(static_cast<const typename C::Number*>(sums), count, stride, d_weight);
  });
}

}  // namespace

extern const ConvKernels conv_kernels{scratch, forward, backward, add_weights};

}  // namespace intarsia::INTARSIA_ISA
