// The backward pass over one head of one sequence: from the last chunk to the first, with the gradient of the state
// carried along. What the forward pass computed inside a chunk is computed again from the inputs, from the errors z
// and from the state before the chunk, which it kept: a state takes as much room as a chunk's inputs, and computing it
// again takes longer than reading it.
//
// With D the gradient of the state at the chunk's end and do that of the outputs:
//
//   du = qkᵀ do + k_end D          (I + kkᵀ diag(beta)) w = du          dv = dz = beta w        dbeta = rowsum(w z)
//   dqk = do uᵀ                    dkk = -dz uᵀ
//   dq_start = do Sᵀ               dk_start = -dz Sᵀ                    dk_end = u Dᵀ
//   D' = total D + q_startᵀ do - k_startᵀ dz
//
// The gradient of a log-decay is what flows across it: the sum of x dx over everything x that it decays. Each such sum
// is taken from terms that were decayed by it, never as a difference of larger sums, so that nothing flows where a
// factor is 0.
#pragma once

#include "forward.h"

namespace intarsia::INTARSIA_ISA {

// Backward substitution inside one block: w in place of `du`, and -beta w, which is -dz.
template <class R, class Products, int WIDTH>
INLINE void substitute_back(const R* kk, const R* beta, R* du, R* minus_dz, int V) {
  constexpr int N = LANES<R>;
  for (int j = BLOCK - 1; j >= 0; j--) {
    Vec<R> w[WIDTH];
    for (int n = 0; n < WIDTH; n++) w[n] = load(du + j * V + n * N);
    for (int i = j + 1; i < BLOCK; i++) {
      const R factor = kk[i * CHUNK + j];
      for (int n = 0; n < WIDTH; n++) w[n] += factor * load(minus_dz + i * V + n * N);
    }
    for (int n = 0; n < WIDTH; n++) {
      store<R>(du + j * V + n * N, w[n]);
      store<R>(minus_dz + j * V + n * N, Products::factor(w[n] * -beta[j]));
    }
  }
}

template <class R, class Products>
void solve_back(const Chunk<R>& c, Products& products, R* du, R* minus_dz, int V) {
  constexpr int N = LANES<R>;
  for (int first = c.rows - BLOCK; first >= 0; first -= BLOCK) {
    const int next = first + BLOCK;
    if (next < c.rows)
      products.product(Unrounded::left, BLOCK, V, c.rows - next, {c.kk + next * CHUNK + first, 1, CHUNK},
                       minus_dz + next * V, V, du + first * V, V, Into::add);
    const R *kk = c.kk + first * CHUNK + first, *beta = c.beta + first;
    R *x = du + first * V, *y = minus_dz + first * V;
    int d = 0;
    for (; d + 8 * N <= V; d += 8 * N) substitute_back<R, Products, 8>(kk, beta, x + d, y + d, V);
    for (; d + 2 * N <= V; d += 2 * N) substitute_back<R, Products, 2>(kk, beta, x + d, y + d, V);
    for (; d < V; d += N) substitute_back<R, Products, 1>(kk, beta, x + d, y + d, V);
  }
}

// The pairs inside one block with a decay for each channel: adds to the gradients of q, of k and of the log-decays.
template <class R>
void block_products_back(const R* q, const R* k, const R* alpha, int K, bool erases, const R* dqk, const R* dkk, R* dq,
                         R* dk, R* flow) {
  constexpr int N = LANES<R>;
  for (int d = 0; d < K; d += N) {
    Vec<R> grad_q[BLOCK], grad_k[BLOCK], across[BLOCK], between[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
      grad_q[i] = load(dq + i * K + d);
      grad_k[i] = load(dk + i * K + d);
      across[i] = load(flow + i * K + d);
    }
    for (int j = 0; j < BLOCK; j++) {
      const Vec<R> key = load(k + j * K + d);
      Vec<R> decay = splat<R>(1);  // from j to i
      for (int i = j + 1; i < BLOCK; i++) {
        decay *= load(alpha + i * K + d);
        between[i] = decay;
      }
      Vec<R> grad_key{}, flows{};
      for (int i = BLOCK - 1; i > j; i--) {
        const Vec<R> carried = between[i] * key;
        grad_q[i] += dqk[i * CHUNK + j] * carried;
        Vec<R> from_rows = dqk[i * CHUNK + j] * load(q + i * K + d);
        if (erases) {
          grad_k[i] += dkk[i * CHUNK + j] * carried;
          from_rows += dkk[i * CHUNK + j] * load(k + i * K + d);
        }
        grad_key += between[i] * from_rows;
        flows += carried * from_rows;
        across[i] += flows;
      }
      grad_key += dqk[j * CHUNK + j] * load(q + j * K + d);
      grad_q[j] += dqk[j * CHUNK + j] * key;
      grad_k[j] += grad_key;
    }
    for (int i = 0; i < BLOCK; i++) {
      store<R>(dq + i * K + d, grad_q[i]);
      store<R>(dk + i * K + d, grad_k[i]);
      store<R>(flow + i * K + d, across[i]);
    }
  }
}

template <class R, class Products>
struct Backward {
  Chunk<R> c;
  Products products;
  int V;
  R *S, *D, *transposed, *raw, *blocks, *starts, *ends, *earlier;
  R* from_rows;  // [2 rows, V]: do, and behind it -dz
  R *u, *du, *z, *dqk, *dkk;
  R *dq, *dk;   // [CHUNK, K]
  R* from_end;  // [CHUNK]: what flows from the state at the chunk's end to each token's write, k_end D u
  R* flow;      // [CHUNK, K], or [CHUNK] for a decay per head: the gradients of the log-decays
  R *bias, *grad_bias, *chunk_bias, *row, *dbeta, *passing;

  Backward(const LinearTask& task, Arena& arena)
      : c(task, arena, true), products(longest_side<R>(task), arena), V(padded<R>(task.V)) {
    const int K = c.K, wider = K > V ? K : V;
    S = arena.take<R>(int64_t(K) * V);
    D = arena.take<R>(int64_t(K) * V);
    transposed = arena.take<R>(int64_t(wider) * (wider > CHUNK ? wider : CHUNK));
    raw = arena.take<R>(2 * CHUNK * K);
    blocks = arena.take<R>(2 * CHUNK * K);
    starts = arena.take<R>(2 * CHUNK * K);
    ends = arena.take<R>(CHUNK * K);
    earlier = arena.take<R>(CHUNK * K);
    from_rows = arena.take<R>(2 * CHUNK * V);
    u = arena.take<R>(CHUNK * V);
    du = arena.take<R>(CHUNK * V);
    z = arena.take<R>(CHUNK * V);
    dqk = arena.take<R>(CHUNK * CHUNK);
    dkk = arena.take<R>(CHUNK * CHUNK);
    dq = arena.take<R>(CHUNK * K);
    dk = arena.take<R>(CHUNK * K);
    flow = arena.take<R>(CHUNK * K);
    from_end = arena.take<R>(CHUNK);
    bias = arena.take<R>(K);
    grad_bias = arena.take<R>(K);
    chunk_bias = arena.take<R>(K);
    row = arena.take<R>(wider);
    dbeta = arena.take<R>(CHUNK);
    passing = arena.take<R>(K);
  }

  void run(const LinearTask& task, const LinearGradients& grads) {
    const R* dt_bias = read_bias(task, bias);
    const int64_t chunks = (task.tokens + CHUNK - 1) / CHUNK;
    rate_gradient = 0;
    zero(grad_bias, c.K);
    State<R>::read(task, grads.d_final, D);
    closing = !grads.d_final;
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--, closing = false)
      chunk_back(task, grads, dt_bias, chunk * CHUNK);
    State<R>::write(task, D, grads.d_initial);
    if (grads.d_rate) *static_cast<R*>(grads.d_rate) = rate_gradient;
    if (grads.d_bias) copy(static_cast<R*>(grads.d_bias), grad_bias, task.decay == Decay::channel ? task.K : 1);
  }

 private:
  R rate_gradient, chunk_rate;
  bool opening;  // the state before the chunk at hand is zero: the first of a sequence that begins with none
  bool closing;  // nobody has read the state after it: D is zero

  // What sums up the keys of tokens that wrote, each times a part of its write.
  static INLINE Unrounded both(bool erases) { return erases ? Unrounded::both : Unrounded::none; }

  // The state before the chunk, where it lies if its rows are whole vectors.
  const R* state_before(const LinearTask& task, int64_t chunk) {
    const R* kept = static_cast<const R*>(task.chunk_states) + chunk * task.chunk_stride;
    if (task.K == c.K && task.V == V) return kept;
    State<R>::read(task, kept, S);
    return S;
  }

  void fetch(const Rows& x, const Rows& y, int numbers) {
    products.ahead.begin(c.tokens);
    products.ahead.add(x, numbers);
    products.ahead.add(y, numbers);
  }
  void fetch_state(const LinearTask& task, int64_t chunk) {
    R* kept = static_cast<R*>(task.chunk_states) + chunk * task.chunk_stride;
    products.ahead.begin(task.K);
    products.ahead.add({reinterpret_cast<char*>(kept), task.V * int64_t(sizeof(R)), Dtype::float32},
                       task.V * int64_t(sizeof(R)) / 4);
  }
  void fetch_inputs(const LinearTask& task, int64_t first) {
    products.ahead.begin(CHUNK);
    products.ahead.add(task.q.rows_from(first), task.K);
    products.ahead.add(task.k.rows_from(first), task.K);
    if (task.decay == Decay::channel) products.ahead.add(task.g.rows_from(first), task.K);
  }

  // What the tokens wrote, u, and the errors z.
  void read_writes(const LinearTask& task, int64_t first) {
    for (int i = 0; i < c.rows; i++) {
      R* to = u + i * V;
      if (i >= c.tokens) {
        zero(to, V);
        zero(z + i * V, V);
      } else if (!task.erases) {
        read_row(task.v, first + i, to, task.V, V);
      } else {
        read_row(task.z, first + i, z + i * V, task.V, V);
        for (int d = 0; d < V; d += LANES<R>) store<R>(to + d, Products::factor(load(z + i * V + d) * c.beta[i]));
      }
    }
  }

  void chunk_back(const LinearTask& task, const LinearGradients& grads, const R* dt_bias, int64_t first) {
    const int K = c.K;
    opening = first == 0 && !task.initial;
    const R* before = opening ? nullptr : state_before(task, first / CHUNK);
    read_tokens(c, task, dt_bias, first);
    fetch(grads.d_o.rows_from(first), (task.erases ? task.z : task.v).rows_from(first), task.V);
    if (!opening) fetch_state(task, first / CHUNK);
    const int rows = c.rows, sides = task.erases ? 2 : 1;
    copy(raw, c.q, 2 * rows * K);
    if (task.decay == Decay::channel) {
      prepare_blocks<R>(c, products, task.erases);
      copy(blocks, c.q, 2 * rows * K);
      anchor_chunk<R>(c, task.erases);
    } else {
      prepare_head<R>(c, products, task.erases, task.decay == Decay::head);
      if (task.decay == Decay::head) anchor_head<R>(c, task.erases);
    }
    read_writes(task, first);
    for (int i = 0; i < rows; i++) {
      if (i < c.tokens)
        read_row(grads.d_o, first + i, from_rows + i * V, task.V, V);
      else
        zero(from_rows + i * V, V);
    }
    fetch(grads.v.rows_from(first), {}, task.V);
    gradients_of_writes(task, grads, first);
    fetch(grads.q.rows_from(first), grads.k.rows_from(first), task.K);
    gradients_of_matrices(before, sides);
    R* to_total = row;  // what flows through the decay of the whole chunk
    if (opening || closing) {
      zero(to_total, K);
    } else {
      for (int d = 0; d < K; d++) {
        Vec<R> products{};
        for (int n = 0; n < V; n += LANES<R>) products += load(before + d * V + n) * load(D + d * V + n);
        to_total[d] = c.total[d] * sum<R>(products);
      }
    }
    if (task.decay == Decay::channel) fetch(grads.g.rows_from(first), {}, task.K);
    if (first) fetch_inputs(task, first - CHUNK);
    if (first || grads.d_initial) {  // somebody reads the gradient of the state before
      products.product(K, V, rows, {c.q, 1, K}, from_rows, V, D, V, Into::decay, c.total);
      if (task.erases)
        products.product(Unrounded::left, K, V, rows, {c.k, 1, K}, from_rows + rows * V, V, D, V, Into::add);
    }
    if (task.decay == Decay::channel)
      scores_back_channel(task.erases, to_total);
    else
      scores_back_head(task, to_total);
    write_gradients(task, grads, dt_bias, first);
  }

  // du, then dz; writes the gradients of v, and those of beta into dbeta.
  void gradients_of_writes(const LinearTask& task, const LinearGradients& grads, int64_t first) {
    const int rows = c.rows;
    // Where a key comes again, D has next to nothing left along it, and k D is far smaller than its terms.
    if (closing)
      zero(du, rows * V);
    else
      products.product(both(task.erases), rows, V, c.K, {c.kT, 1, CHUNK}, D, V, du, V, Into::replace);
    for (int j = 0; j < rows; j++) from_end[j] = dot(u + j * V, du + j * V, V);
    for (int a = 0; a < rows; a += BLOCK)
      products.product(task.erases ? Unrounded::left : Unrounded::none, BLOCK, V, rows - a,
                       {c.qk + a * CHUNK + a, 1, CHUNK}, from_rows + a * V, V, du + a * V, V, Into::add);
    if (!task.erases) {
      for (int i = 0; i < c.tokens; i++) write_row(grads.v, first + i, du + i * V, task.V);
      return;
    }
    R* minus_dz = from_rows + rows * V;
    solve_back<R>(c, products, du, minus_dz, V);
    for (int i = 0; i < c.tokens; i++) {
      Vec<R> products{};
      for (int d = 0; d < V; d += LANES<R>) {
        products += load(du + i * V + d) * load(z + i * V + d);
        store<R>(row + d, -load(minus_dz + i * V + d));
      }
      dbeta[i] = sum<R>(products);
      write_row(grads.v, first + i, row, task.V);
    }
  }

  // dqk, dkk (below the diagonal), dq_start and dk_start into `starts`, dk_end into `ends`.
  void gradients_of_matrices(const R* before, int sides) {
    const int rows = c.rows, K = c.K;
    transpose<R>(u, V, transposed, CHUNK, round_up(rows, LANES<R>), V);
    for (int a = 0; a < rows; a += BLOCK) {
      products.product(BLOCK, a + BLOCK, V, {from_rows + a * V, V, 1}, transposed, CHUNK, dqk + a * CHUNK, CHUNK,
                       Into::replace);
      if (sides == 2)
        products.product(BLOCK, a + BLOCK, V, {from_rows + (rows + a) * V, V, 1}, transposed, CHUNK, dkk + a * CHUNK,
                         CHUNK, Into::replace);
      for (int i = a; i < a + BLOCK; i++) {
        for (int j = i + 1; j < a + BLOCK; j++) dqk[i * CHUNK + j] = 0;
        for (int j = i; j < a + BLOCK; j++) dkk[i * CHUNK + j] = 0;
      }
    }
    if (opening) {
      zero(starts, sides * rows * K);
    } else {
      transpose<R>(before, V, transposed, K, K, V);
      products.product(sides * rows, K, V, {from_rows, V, 1}, transposed, K, starts, K, Into::replace);
    }
    if (closing) {
      zero(ends, rows * K);
    } else {
      transpose<R>(D, V, transposed, K, K, V);
      products.product(rows, K, V, {u, V, 1}, transposed, K, ends, K, Into::replace);
    }
  }

  void scores_back_channel(bool erases, const R* to_total) {
    constexpr int N = LANES<R>;
    const int rows = c.rows, K = c.K;
    R *d_q = starts, *d_k = starts + rows * K;  // of the rows, decayed from the chunk's start, then from the block's
    R* through = passing;                       // what flows through every decay of the block at hand
    copy(through, to_total, K);
    for (int first = rows - BLOCK; first >= 0; first -= BLOCK) {
      const R *alpha = c.alpha + first * K, *total = c.block_totals + first / BLOCK * K;
      R* across = flow + first * K;
      for (int i = 0; i < BLOCK; i++) copy(across + i * K, through, K);
      columns_back(erases, first, total, across);

      // The rows of this block decay from the chunk's start to the block's, through all earlier blocks.
      for (int d = 0; d < K; d += N) {
        Vec<R> before = splat<R>(1);
        for (int b = 0; b < first / BLOCK; b++) before *= load(c.block_totals + b * K + d);
        Vec<R> flows = load(through + d);
        for (int i = first * K + d; i < (first + BLOCK) * K; i += K) {
          flows += load(c.q + i) * load(d_q + i);
          store<R>(d_q + i, load(d_q + i) * before);
          if (erases) {
            flows += load(c.k + i) * load(d_k + i);
            store<R>(d_k + i, load(d_k + i) * before);
          }
        }
        store<R>(through + d, flows);
      }
      if (first) {
        // With the keys of earlier blocks, which columns_back has left decayed to this block's start.
        products.product(both(erases), BLOCK, K, first, {dqk + first * CHUNK, CHUNK, 1}, earlier, K, d_q + first * K, K,
                         Into::add);
        if (erases)
          products.product(both(erases), BLOCK, K, first, {dkk + first * CHUNK, CHUNK, 1}, earlier, K, d_k + first * K,
                           K, Into::add);
      }
      rows_back(erases, first, alpha, across);
      block_products_back<R>(raw + first * K, raw + (rows + first) * K, alpha, K, erases, dqk + first * CHUNK + first,
                             dkk + first * CHUNK + first, dq + first * K, dk + first * K, across);
    }
  }

  // The keys of the blocks before `first` decay through this one, and meet its rows.
  void columns_back(bool erases, int first, const R* total, R* across) {
    constexpr int N = LANES<R>;
    if (!first) return;
    const int rows = c.rows, K = c.K;
    by_channels<R>(K, [=, this](auto width, int d) {
      constexpr int W = decltype(width)::value;
      Vec<R> to_here[W], flows[W];
      for (int w = 0; w < W; w++) to_here[w] = splat<R>(1), flows[w] = Vec<R>{};
      for (int b = first - BLOCK; b >= 0; b -= BLOCK) {
        for (int j = b; j < b + BLOCK; j++)
          for (int w = 0; w < W; w++) {
            const int at = j * K + d + w * N;
            const Vec<R> key = load(c.block_k + at) * to_here[w], grad = load(ends + at) * load(total + d + w * N);
            store<R>(earlier + at, key);
            store<R>(ends + at, grad);
            flows[w] += key * grad;
          }
        for (int w = 0; w < W; w++) to_here[w] *= load(c.block_totals + b / BLOCK * K + d + w * N);
      }
      for (int i = 0; i < BLOCK; i++)
        for (int w = 0; w < W; w++) {
          const int at = i * K + d + w * N;
          store<R>(across + at, load(across + at) + flows[w]);
        }
    });
    products.product(first, K, BLOCK, {dqk + first * CHUNK, 1, CHUNK}, blocks + first * K, K, ends, K, Into::add);
    if (erases)
      products.product(Unrounded::both, first, K, BLOCK, {dkk + first * CHUNK, 1, CHUNK}, blocks + (rows + first) * K,
                       K, ends, K, Into::add);
  }

  // From the rows' and columns' sides of a block, decayed from its start and to its end, to q, k and the log-decays.
  void rows_back(bool erases, int first, const R* alpha, R* across) {
    constexpr int N = LANES<R>;
    const int rows = c.rows, K = c.K;
    by_channels<R>(K, [=, this](auto width, int d) {
      constexpr int W = decltype(width)::value;
      Vec<R> decay[W], flows[W];
      for (int w = 0; w < W; w++) decay[w] = splat<R>(1), flows[w] = Vec<R>{};
      for (int i = 0; i < BLOCK; i++)
        for (int w = 0; w < W; w++) {
          const int in_block = i * K + d + w * N, at = first * K + in_block;
          store<R>(across + in_block, load(across + in_block) + flows[w]);  // of the columns before i
          flows[w] += load(c.block_k + at) * load(ends + at);
          decay[w] *= load(alpha + in_block);
          store<R>(dq + at, load(starts + at) * decay[w]);
          store<R>(dk + at, erases ? load(starts + rows * K + at) * decay[w] : Vec<R>{});
        }
      for (int w = 0; w < W; w++) decay[w] = splat<R>(1), flows[w] = Vec<R>{};
      for (int i = BLOCK - 1; i >= 0; i--)
        for (int w = 0; w < W; w++) {
          const int in_block = i * K + d + w * N, at = first * K + in_block;
          flows[w] += load(blocks + at) * load(starts + at);
          if (erases) flows[w] += load(blocks + rows * K + at) * load(starts + rows * K + at);
          store<R>(across + in_block, load(across + in_block) + flows[w]);  // of the rows from i on
          store<R>(dk + at, load(dk + at) + load(ends + at) * decay[w]);
          decay[w] *= load(alpha + in_block);
        }
    });
  }

  static R dot(const R* x, const R* y, int count) {
    Vec<R> products{};
    for (int d = 0; d < count; d += LANES<R>) products += load(x + d) * load(y + d);
    return sum<R>(products);
  }

  void scores_back_head(const LinearTask& task, const R* to_total) {
    constexpr int N = LANES<R>;
    const int rows = c.rows, K = c.K;
    const bool decays = task.decay == Decay::head;
    if (decays) {
      R through = 0;
      for (int d = 0; d < task.K; d++) through += to_total[d];
      for (int i = 0; i < rows; i++) flow[i] = through;
      pair_flows(task.erases);
      const R* to_end = c.decays + (rows - 1) * CHUNK;
      R flows = 0;
      for (int j = 0; j < rows; j++) {
        flow[j] += flows;
        flows += from_end[j];
        multiply_row(ends + j * K, to_end[j], K);
      }
      flows = 0;
      for (int i = rows - 1; i >= 0; i--) {
        flows += dot(c.q + i * K, starts + i * K, K);
        multiply_row(starts + i * K, c.from_start[i], K);
        if (task.erases) {
          flows += dot(c.k + i * K, starts + (rows + i) * K, K);
          multiply_row(starts + (rows + i) * K, c.from_start[i], K);
        }
        flow[i] += flows;
      }
    }
    // From here on the gradients of the products without decay.
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < round_up(i + 1, BLOCK); j += N) {
        const Vec<R> decay = load(c.decays + i * CHUNK + j);
        store<R>(dqk + i * CHUNK + j, load(dqk + i * CHUNK + j) * decay);
        if (task.erases) store<R>(dkk + i * CHUNK + j, load(dkk + i * CHUNK + j) * decay);
      }
    copy(dq, starts, rows * K);
    copy(dk, ends, rows * K);
    if (task.erases)
      for (int i = 0; i < rows * K; i += N) store<R>(dk + i, load(dk + i) + load(starts + rows * K + i));
    const R *q = raw, *k = raw + rows * K;
    for (int a = 0; a < rows; a += BLOCK) {
      products.product(both(task.erases), BLOCK, K, a + BLOCK, {dqk + a * CHUNK, CHUNK, 1}, k, K, dq + a * K, K,
                       Into::add);
      products.product(BLOCK, K, rows - a, {dqk + a * CHUNK + a, 1, CHUNK}, q + a * K, K, dk + a * K, K, Into::add);
      if (!task.erases) continue;
      products.product(Unrounded::both, BLOCK, K, a + BLOCK, {dkk + a * CHUNK, CHUNK, 1}, k, K, dk + a * K, K,
                       Into::add);
      products.product(Unrounded::both, BLOCK, K, rows - a, {dkk + a * CHUNK + a, 1, CHUNK}, k + a * K, K, dk + a * K,
                       K, Into::add);
    }
  }

  // What flows between the tokens of the chunk: the pair (i, j) crosses the decays of j + 1 .. i.
  void pair_flows(bool erases) {
    constexpr int N = LANES<R>;
    const int rows = c.rows;
    R* below = z;  // a buffer: for each column, what its pairs with the rows from i on carry
    zero(below, CHUNK);
    for (int i = rows - 1; i >= 0; i--) {
      R across = 0;
      for (int j = 0; j < round_up(i + 1, BLOCK); j += N) {
        Vec<R> pairs = load(dqk + i * CHUNK + j) * load(c.qk + i * CHUNK + j);
        if (erases) pairs += load(dkk + i * CHUNK + j) * load(c.kk + i * CHUNK + j);
        store<R>(below + j, load(below + j) + pairs);
      }
      for (int j = 0; j < i; j++) across += below[j];
      flow[i] += across;
    }
  }

  void write_gradients(const LinearTask& task, const LinearGradients& grads, const R* dt_bias, int64_t first) {
    const int K = c.K;
    // Summed up a chunk at a time: sums of many tokens, one by one, would lose digits.
    chunk_rate = 0;
    zero(chunk_bias, K);
    for (int i = 0; i < c.tokens; i++) {
      const int64_t t = first + i;
      multiply_row(dq + i * K, R(task.scale), K);
      if (task.normalize) {
        normalized_back(task.q, t, c.q_length[i], dq + i * K, task.K);
        normalized_back(task.k, t, c.k_length[i], dk + i * K, task.K);
      }
      write_row(grads.q, t, dq + i * K, task.K);
      write_row(grads.k, t, dk + i * K, task.K);
      if (task.erases) {
        if (task.beta_scale > 0) {
          const R x = sigmoid<R>(splat<R>(read_number<R>(task.beta, t)))[0];
          dbeta[i] *= R(task.beta_scale) * x * (1 - x);
        }
        write_number(grads.beta, t, dbeta[i]);
      }
      if (task.decay == Decay::channel)
        decay_back(task, grads, dt_bias, t, flow + i * K, task.K);
      else if (task.decay == Decay::head)
        decay_back(task, grads, dt_bias, t, flow + i, 1);
    }
    rate_gradient += chunk_rate;
    for (int d = 0; d < K; d += LANES<R>) store<R>(grad_bias + d, load(grad_bias + d) + load(chunk_bias + d));
  }

  // x was x0 * inverse with `inverse` one over the length of x0; `grad` of x becomes that of x0.
  void normalized_back(const Rows& from, int64_t t, R inverse, R* grad, int count) {
    read_row(from, t, row, count, c.K);
    const R along = dot(row, grad, c.K) * inverse * inverse;
    for (int d = 0; d < c.K; d += LANES<R>) store<R>(grad + d, (load(grad + d) - load(row + d) * along) * inverse);
  }

  // `flows` are the gradients of the log-decays; with a gate they become those of its raw numbers.
  void decay_back(const LinearTask& task, const LinearGradients& grads, const R* dt_bias, int64_t t, R* flows,
                  int count) {
    constexpr int N = LANES<R>;
    if (task.gate != Gate::none) {
      // Whole vectors; behind the last number stand zeros.
      R* grad = earlier;
      const int width = padded<R>(count);
      zero(grad, width);
      copy(grad, flows, count);
      read_row(task.g, t, row, count, width);
      Vec<R> rate{};
      for (int d = 0; d < width; d += N) {
        Vec<R> f = load(row + d), dg = load(grad + d), df;
        if (dt_bias) f += load(dt_bias + d);
        if (task.gate == Gate::softplus) {
          df = dg * sigmoid<R>(f) * R(-task.rate);
          rate += dg * softplus<R>(f) * R(-task.rate);
        } else {
          const Vec<R> x = sigmoid<R>(f * R(task.rate));
          df = dg * x * (R(1) - x) * R(task.bound * task.rate);
          rate += df * f;
        }
        store<R>(grad + d, df);
        store<R>(chunk_bias + d, load(chunk_bias + d) + df);
      }
      chunk_rate += sum<R>(rate);
      flows = grad;
    }
    write_row(grads.g, t, flows, count);
  }
};

}  // namespace intarsia::INTARSIA_ISA
