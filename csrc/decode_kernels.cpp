// The decode step for one instruction set: this file is compiled once for each.
//
// A layer's token after its projections: convolution, SiLU, lengths of q and k, gates, the rule, gated RMSNorm. The
// rule is written so that the board S is read once and written once:
//
//   p = Sᵀ (e^g k)    u = beta (v - p)    o = Sᵀ (e^g q) + (q k) u    S' = e^g S + k u
//
// and the general rule, which erases along a what b reads:
//
//   p = Sᵀ b    o = Sᵀ (e^g q) + (q k) v - (q a) p    S' = e^g S + k v - a p
//
// The board is worked on in slices of columns, as wide as the registers hold sums for: the wider, the more the
// memory is read in its own order. What the first pass reads is still in the caches for the second. All tokens that
// are at hand go over a slice before the next one has its turn.
#include "borrowed_rows.h"
#include "decode_task.h"

namespace intarsia::INTARSIA_ISA {

namespace {

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Vectors side by side in the widest slice.
constexpr int SLICE = VECTOR_BYTES == 64 ? 8 : 4;

template <class R>
INLINE void multiply(R* x, R factor, int width) {
  for (int d = 0; d < width; d += LANES<R>) store<R>(x + d, load(x + d) * factor);
}

// One token as the rule takes it.
template <class R>
struct Token {
  const R *k, *alpha, *k_decayed, *q_decayed, *a;  // [K]; of the general rule b stands for k_decayed
  const R* v;                                      // [V]
  R* o;                                            // [V]
  R qk, beta, qa;
};

enum class Rule { additive, delta, general };

// A token goes over WIDTH vectors of columns of the board.
template <class R, int WIDTH, Rule RULE>
INLINE void update(const Token<R>& token, int column, const R* from, R* to, int64_t stride, int K) {
  // Few columns have the sums of some rows apart, so that additions need not wait for each other.
  constexpr int N = LANES<R>, PARTS = WIDTH < 4 ? 4 / WIDTH : 1;
  Vec<R> recalled[PARTS][WIDTH] = {}, read[PARTS][WIDTH] = {};
  const auto read_row = [&](int d, int part) {
    const R *row = from + d * stride, k = token.k_decayed[d], q = token.q_decayed[d];
    for (int w = 0; w < WIDTH; w++) {
      const Vec<R> S = load(row + w * N);
      if (RULE != Rule::additive) recalled[part][w] += S * k;
      read[part][w] += S * q;
    }
  };
  int d = 0;
  for (; d + PARTS <= K; d += PARTS)
    for (int part = 0; part < PARTS; part++) read_row(d + part, part);
  for (; d < K; d++) read_row(d, 0);

  Vec<R> u[WIDTH];
  for (int w = 0; w < WIDTH; w++) {
    for (int part = 1; part < PARTS; part++) {
      recalled[0][w] += recalled[part][w];
      read[0][w] += read[part][w];
    }
    u[w] = load(token.v + column + w * N);
    if (RULE == Rule::delta) u[w] = (u[w] - recalled[0][w]) * token.beta;
    // Of two products either could be the one that is rounded.
    const Vec<R> written =
        RULE == Rule::general ? rounded<R>(u[w] * token.qk) - rounded<R>(recalled[0][w] * token.qa) : u[w] * token.qk;
    store<R>(token.o + column + w * N, read[0][w] + written);
  }
  for (d = 0; d < K; d++) {
    const R alpha = token.alpha[d], k = token.k[d];
    const R a = RULE == Rule::general ? token.a[d] : R(0);
    for (int w = 0; w < WIDTH; w++) {
      Vec<R> change = rounded<R>(u[w] * k);
      if (RULE == Rule::general) change = rounded<R>(change - rounded<R>(recalled[0][w] * a));
      store<R>(to + d * stride + w * N, load(from + d * stride + w * N) * alpha + change);
    }
  }
}

template <class R>
struct Step {
  static constexpr int N = LANES<R>;
  const DecodeLayer& layer;
  int K, V, wider, taps;             // K and V in whole vectors
  R *q, *k;                          // [DECODE_ROWS, K]
  R *alpha, *k_decayed, *q_decayed;  // [DECODE_ROWS * group, K]
  R *a, *qa;                         // [DECODE_ROWS * group, K] and [DECODE_ROWS * group], of the general rule
  R *v, *o;                          // [DECODE_ROWS * group, V]
  R* z;                              // [V]
  R *beta, *qk;                      // [DECODE_ROWS * group] and [DECODE_ROWS]
  R* rest;                           // [K, N]: the columns that fill no vector
  R* inputs;                         // [DECODE_ROWS, wider]
  R* tail;                           // [W - 1, N], twice: the channels that fill no vector

  Step(const DecodeLayer& layer, Arena& arena)
      : layer(layer),
        K(padded<R>(layer.K)),
        V(padded<R>(layer.V)),
        wider(K > V ? K : V),
        taps(layer.W),
        q(arena.take<R>(DECODE_ROWS * K)),
        k(arena.take<R>(DECODE_ROWS * K)),
        alpha(arena.take<R>(DECODE_ROWS * layer.group() * K)),
        k_decayed(arena.take<R>(DECODE_ROWS * layer.group() * K)),
        q_decayed(arena.take<R>(DECODE_ROWS * layer.group() * K)),
        a(arena.take<R>(layer.general ? DECODE_ROWS * layer.group() * K : 0)),
        qa(arena.take<R>(layer.general ? DECODE_ROWS * layer.group() : 0)),
        v(arena.take<R>(DECODE_ROWS * layer.group() * V)),
        o(arena.take<R>(DECODE_ROWS * layer.group() * V)),
        z(arena.take<R>(V)),
        beta(arena.take<R>(DECODE_ROWS * layer.group())),
        qk(arena.take<R>(DECODE_ROWS)),
        rest(arena.take<R>(K * N)),
        inputs(arena.take<R>(DECODE_ROWS * layer.group() * wider)),
        tail(arena.take<R>(2 * taps * N)) {}

  void run(const DecodeTask& task) {
    const int group = layer.group(), most = task.heads > 1 ? 1 : DECODE_ROWS;
    const int64_t size = int64_t(layer.K) * layer.V;
    const R *board = static_cast<const R*>(task.board_from), *conv = static_cast<const R*>(task.conv_from);
    R *board_to = static_cast<R*>(task.board_to), *conv_to = static_cast<R*>(task.conv_to);
    for (int64_t first = 0; first < task.tokens; first += most) {
      const int tokens = int(task.tokens - first < most ? task.tokens - first : most);
      // First what lies in small pieces all over the memory, then the boards, one behind the other.
      prepare(task, first, tokens, conv, conv_to);
      for (int j = 0; j < task.heads * group; j++) {
        const int head = task.head * group + j;
        R* to = board_to + head * size;
        if (!board) zero(to, size);
        over_board(board ? board + head * size : to, to, tokens, j / group * tokens, j * tokens);
        for (int t = 0; t < tokens; t++) write_output(task, first + t, head, o + (j * tokens + t) * V);
      }
      board = board_to, conv = conv_to;
    }
  }

 private:
  // The rows of q and k of the task's key head i are i * tokens and so on, those of its value heads in the same way.
  // What is alike is done for all heads before what comes next: long loops keep the processor busy.
  void prepare(const DecodeTask& task, int64_t first, int tokens, const R* conv, R* conv_to) {
    const int keys = layer.H * layer.K, group = layer.group(), values = task.heads * group;
    const int channel = task.head * layer.K, value_channel = 2 * keys + task.head * group * layer.V;
    read_heads(task, first, tokens, channel, task.heads, layer.K, K, conv, conv_to, q);
    read_heads(task, first, tokens, keys + channel, task.heads, layer.K, K, conv, conv_to, k);
    read_heads(task, first, tokens, value_channel, values, layer.V, V, conv, conv_to, v);
    for (int row = 0; row < task.heads * tokens; row++) qk[row] = lengths(q + row * K, k + row * K);
    for (int j = 0; j < values; j++) {
      decays(task, first, tokens, task.head * group + j, j / group * tokens, j * tokens);
      strengths(task, first, tokens, task.head * group + j, beta + j * tokens);
      if (layer.general) erasures(task, first, tokens, task.head * group + j, j / group * tokens, j * tokens);
    }
  }

  // `count` channels of each of some heads; of one token they may lie side by side in the rows as they do in memory.
  void read_heads(const DecodeTask& task, int64_t first, int tokens, int channel, int heads, int count, int width,
                  const R* conv, R* conv_to, R* to) {
    if (tokens == 1 && count == width)
      return read_channels(task, first, 1, channel, heads * count, heads * width, conv, conv_to, to);
    for (int i = 0; i < heads; i++)
      read_channels(task, first, tokens, channel + i * count, count, width, conv, conv_to, to + i * tokens * width);
  }

  // `count` channels of some tokens behind the convolution, a row of `width` numbers each.
  void read_channels(const DecodeTask& task, int64_t first, int tokens, int channel, int count, int width,
                     const R* conv, R* conv_to, R* to) {
    const Rows x = task.x.columns_from(channel);
    if (!taps) {
      for (int t = 0; t < tokens; t++) read_row(x, first + t, to + t * width, count, width);
      return;
    }
    for (int t = 0; t < tokens; t++) read_row(x, first + t, inputs + t * width, count, width);
    const R *weight = static_cast<const R*>(layer.conv_weight) + channel, *before = conv ? conv + channel : nullptr;
    const int stride = layer.channels(), whole = count / N * N, left = count - whole, past = taps - 1;
    R* after = past ? conv_to + channel : nullptr;  // with one tap there is nothing to keep
    taps == 4 ? convolve<4>(weight, before, after, stride, whole, inputs, width, tokens, to)
              : convolve<0>(weight, before, after, stride, whole, inputs, width, tokens, to);
    if (!left) return;
    R *old_tail = tail, *new_tail = tail + past * N;
    zero(tail, 2 * past * N);
    for (int i = 0; before && i < past; i++) copy(old_tail + i * N, before + i * stride + whole, left);
    convolve_vector<0>(weight + whole, old_tail, new_tail, stride, N, inputs + whole, width, tokens, to + whole);
    for (int i = 0; i < past; i++) copy(after + i * stride + whole, new_tail + i * N, left);
    for (int t = 0; t < tokens; t++) zero(to + t * width + count, width - count);
  }

  // With 0 for TAPS their number is known at run time only.
  template <int TAPS>
  void convolve(const R* weight, const R* before, R* after, int stride, int count, const R* x, int width, int tokens,
                R* to) const {
    for (int c = 0; c < count; c += N)
      convolve_vector<TAPS>(weight + c, before ? before + c : nullptr, after ? after + c : nullptr, stride, stride,
                            x + c, width, tokens, to + c);
  }
  template <int TAPS>
  INLINE void convolve_vector(const R* weight, const R* before, R* after, int stride, int past_stride, const R* x,
                              int width, int tokens, R* to) const {
    const int taps = TAPS ? TAPS : this->taps, past = taps - 1;
    const auto input = [&](int place) {  // counted from the oldest
      if (place >= past) return load(x + (place - past) * width);
      return before ? load(before + place * past_stride) : Vec<R>{};
    };
    for (int t = 0; t < tokens; t++) {
      Vec<R> sum{};  // and not the first product: of two products either could be the one that is rounded
      for (int w = 0; w < taps; w++) sum += input(t + w) * load(weight + w * stride);
      store<R>(to + t * width, layer.silu ? sum * sigmoid<R>(sum) : sum);
    }
    for (int i = 0; i < past; i++) store<R>(after + i * past_stride, input(tokens + i));
  }

  // Divide q and k by their lengths, scale q, and return their product.
  INLINE R lengths(R* q, R* k) const {
    Vec<R> sums[3] = {};
    for (int d = 0; d < K; d += N) {
      const Vec<R> a = load(q + d), b = load(k + d);
      sums[0] += a * a, sums[1] += b * b, sums[2] += a * b;
    }
    R of_q = R(layer.scale), of_k = 1;
    if (layer.normalize) {
      of_q /= square_root(sum<R>(sums[0]) + R(L2NORM_EPS));
      of_k /= square_root(sum<R>(sums[1]) + R(L2NORM_EPS));
      multiply(k, of_k, K);
    }
    multiply(q, of_q, K);
    return sum<R>(sums[2]) * of_q * of_k;
  }

  // What remains of a value head's board after each token, and q and k behind that decay.
  void decays(const DecodeTask& task, int64_t first, int tokens, int head, int key_row, int row) {
    const bool by_channel = layer.decay == Decay::channel;
    const R rate = layer.gate == Gate::none ? R(0) : static_cast<const R*>(layer.rate)[head];
    const R* bias =
        layer.bias ? static_cast<const R*>(layer.bias) + int64_t(head) * (by_channel ? layer.K : 1) : nullptr;
    for (int t = 0; t < tokens; t++) {
      R* a = alpha + (row + t) * K;
      if (layer.decay == Decay::none) {
        for (int d = 0; d < K; d++) a[d] = 1;
      } else if (by_channel) {
        read_row(task.g.columns_from(int64_t(head) * layer.K), first + t, a, layer.K, K);
        for (int d = 0; d < K; d += N) store<R>(a + d, factor(load(a + d), rate, bias ? load(bias + d) : Vec<R>{}));
      } else {
        const R g = read_number<R>(task.g.columns_from(head), first + t);
        const R remains = factor(splat<R>(g), rate, splat<R>(bias ? bias[0] : R(0)))[0];
        for (int d = 0; d < K; d++) a[d] = remains;
      }
      for (int d = 0; d < K; d += N) {
        store<R>(k_decayed + (row + t) * K + d, load(k + (key_row + t) * K + d) * load(a + d));
        store<R>(q_decayed + (row + t) * K + d, load(q + (key_row + t) * K + d) * load(a + d));
      }
    }
  }
  // What the general rule erases along, and what it reads by.
  void erasures(const DecodeTask& task, int64_t first, int tokens, int head, int key_row, int row) {
    const int64_t column = int64_t(head) * layer.K;
    for (int t = 0; t < tokens; t++) {
      R* to = a + (row + t) * K;
      read_row(task.a.columns_from(column), first + t, to, layer.K, K);
      read_row(task.b.columns_from(column), first + t, k_decayed + (row + t) * K, layer.K, K);
      Vec<R> product{};
      for (int d = 0; d < K; d += N) product += load(q + (key_row + t) * K + d) * load(to + d);
      qa[row + t] = sum<R>(product);
    }
  }
  INLINE Vec<R> factor(Vec<R> g, R rate, Vec<R> bias) const {
    switch (layer.gate) {
      case Gate::none: return exp<R>(g);
      case Gate::softplus: return exp<R>(softplus<R>(g + bias) * -rate);
      case Gate::bounded: return exp<R>(sigmoid<R>((g + bias) * rate) * R(layer.bound));
    }
    return g;
  }

  void strengths(const DecodeTask& task, int64_t first, int tokens, int head, R* to) {
    const Rows raw = task.beta.columns_from(head);
    for (int t = 0; t < tokens && layer.erases; t++) {
      to[t] = raw ? read_number<R>(raw, first + t) : R(1);
      if (raw && layer.beta_scale > 0) to[t] = sigmoid<R>(splat<R>(to[t]))[0] * R(layer.beta_scale);
    }
  }

  void over_board(const R* from, R* to, int tokens, int key_row, int row) {
    int c = slices<SLICE>(from, to, 0, tokens, key_row, row);
    c = slices<4>(from, to, c, tokens, key_row, row);
    c = slices<2>(from, to, c, tokens, key_row, row);
    c = slices<1>(from, to, c, tokens, key_row, row);
    if (c == layer.V) return;
    // The columns that fill no vector are copied together, with zeros behind.
    const int left = layer.V - c;
    for (int d = 0; d < layer.K; d++)
      for (int i = 0; i < N; i++) rest[d * N + i] = i < left ? from[int64_t(d) * layer.V + c + i] : R(0);
    for (int t = 0; t < tokens; t++) update_slice<1>(key_row + t, row + t, c, rest, rest, N);
    for (int d = 0; d < layer.K; d++) copy(to + int64_t(d) * layer.V + c, rest + d * N, left);
  }
  // As many slices as fit; returns the column behind them.
  template <int WIDTH>
  INLINE int slices(const R* from, R* to, int column, int tokens, int key_row, int row) {
    for (; column + WIDTH * N <= layer.V; column += WIDTH * N)
      for (int t = 0; t < tokens; t++)
        update_slice<WIDTH>(key_row + t, row + t, column, (t ? to : from) + column, to + column, layer.V);
    return column;
  }
  template <int WIDTH>
  INLINE void update_slice(int key_row, int row, int column, const R* from, R* to, int64_t stride) {
    const Token<R> token{k + key_row * K,
                         alpha + row * K,
                         k_decayed + row * K,
                         q_decayed + row * K,
                         layer.general ? a + row * K : nullptr,
                         v + row * V,
                         o + row * V,
                         qk[key_row],
                         beta[row],
                         layer.general ? qa[row] : R(0)};
    if (layer.general) return update<R, WIDTH, Rule::general>(token, column, from, to, stride, layer.K);
    layer.erases ? update<R, WIDTH, Rule::delta>(token, column, from, to, stride, layer.K)
                 : update<R, WIDTH, Rule::additive>(token, column, from, to, stride, layer.K);
  }

  void write_output(const DecodeTask& task, int64_t t, int head, R* row) {
    const int64_t column = int64_t(head) * layer.V;
    if (layer.norm_weight) {
      const R* norm_weight = static_cast<const R*>(layer.norm_weight);
      Vec<R> squares{};
      for (int d = 0; d < V; d += N) squares += load(row + d) * load(row + d);
      const R inverse = R(1) / square_root(sum<R>(squares) / R(layer.V) + R(layer.norm_eps));
      if (layer.output_gate != OutputGate::none) read_row(task.z.columns_from(column), t, z, layer.V, V);
      for (int d = 0; d < V; d += N) {
        Vec<R> y = load(row + d) * inverse * load(norm_weight + d);
        if (layer.output_gate != OutputGate::none) {
          const Vec<R> raw = load(z + d), gate = sigmoid<R>(raw);
          y *= layer.output_gate == OutputGate::swish ? raw * gate : gate;
        }
        store<R>(row + d, y);
      }
    }
    write_row(task.o.columns_from(column), t, row, layer.V);
  }
};

int64_t scratch(const DecodeLayer& layer, bool wide) {
  Arena counter;
  wide ? void(Step<double>(layer, counter)) : void(Step<float>(layer, counter));
  return counter.used();
}

void step(const DecodeLayer& layer, const DecodeTask& task, bool wide, char* scratch) {
  Arena arena(scratch);
  wide ? Step<double>(layer, arena).run(task) : Step<float>(layer, arena).run(task);
}

}  // namespace

extern const DecodeKernels decode_kernels{scratch, step};

}  // namespace intarsia::INTARSIA_ISA
