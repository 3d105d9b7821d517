// The forward pass over one head of one sequence, chunk by chunk:
//
//   (I + kk diag(beta)) z = v - k_start S        u = beta z      what each token writes; z is its error
//   o = q_start S + qk u                         S' = total S + k_endᵀ u
//
// The additive rule has u = v.
#pragma once

#include "chunk.h"

namespace intarsia::INTARSIA_ISA {

template <class R>
struct State {
  static void read(const LinearTask& task, const void* from, R* S) {
    const int K = padded<R>(task.K), V = padded<R>(task.V);
    zero(S, int64_t(K) * V);
    if (!from) return;
    for (int d = 0; d < task.K; d++)
      copy(S + int64_t(d) * V, static_cast<const R*>(from) + d * task.state_stride, task.V);
  }
  static void write(const LinearTask& task, const R* S, void* to) {
    const int V = padded<R>(task.V);
    if (!to) return;
    for (int d = 0; d < task.K; d++) copy(static_cast<R*>(to) + d * task.state_stride, S + int64_t(d) * V, task.V);
  }
};

// Forward substitution inside one block: errors z (in place of `r`) and writes u = beta z.
template <class R, class Products, int WIDTH>
INLINE void substitute(const R* kk, const R* beta, R* r, R* u, int V) {
  constexpr int N = LANES<R>;
  for (int i = 0; i < BLOCK; i++) {
    Vec<R> z[WIDTH];
    for (int w = 0; w < WIDTH; w++) z[w] = load(r + i * V + w * N);
    for (int j = 0; j < i; j++) {
      const R factor = kk[i * CHUNK + j];
      for (int w = 0; w < WIDTH; w++) z[w] -= factor * load(u + j * V + w * N);
    }
    for (int w = 0; w < WIDTH; w++) {
      store<R>(r + i * V + w * N, z[w]);
      store<R>(u + i * V + w * N, Products::factor(z[w] * beta[i]));
    }
  }
}

// The errors and writes of a chunk from r = v - k_start S.
template <class R, class Products>
void solve(const Chunk<R>& c, Products& products, R* r, R* u, int V) {
  constexpr int N = LANES<R>;
  for (int first = 0; first < c.rows; first += BLOCK) {
    if (first)
      products.product(Unrounded::left, BLOCK, V, first, {c.kk + first * CHUNK, CHUNK, 1}, u, V, r + first * V, V,
                       Into::subtract);
    const R* kk = c.kk + first * CHUNK + first;
    int d = 0;
    const R* beta = c.beta + first;
    R *errors = r + first * V, *writes = u + first * V;
    for (; d + 8 * N <= V; d += 8 * N) substitute<R, Products, 8>(kk, beta, errors + d, writes + d, V);
    for (; d + 2 * N <= V; d += 2 * N) substitute<R, Products, 2>(kk, beta, errors + d, writes + d, V);
    for (; d < V; d += N) substitute<R, Products, 1>(kk, beta, errors + d, writes + d, V);
  }
}

// dt_bias in the kernel's padding, or null.
template <class R>
const R* read_bias(const LinearTask& task, R* to) {
  if (!task.bias) return nullptr;
  const int count = task.decay == Decay::channel ? task.K : 1;
  zero(to, padded<R>(task.K));
  copy(to, static_cast<const R*>(task.bias), count);
  return to;
}

template <class R, class Products>
struct Forward {
  Chunk<R> c;
  Products products;
  int V;
  bool empty;  // nothing is remembered yet: S is zero, and so is what is read from it
  R *S, *from_state, *u, *bias;

  Forward(const LinearTask& task, Arena& arena)
      : c(task, arena), products(longest_side<R>(task), arena), V(padded<R>(task.V)) {
    S = arena.take<R>(int64_t(c.K) * V);
    from_state = arena.take<R>(2 * CHUNK * V);
    u = arena.take<R>(CHUNK * V);
    bias = arena.take<R>(c.K);
  }

  void run(const LinearTask& task) {
    const R* dt_bias = read_bias(task, bias);
    State<R>::read(task, task.initial, S);
    empty = !task.initial;
    for (int64_t first = 0; first < task.tokens; first += CHUNK, empty = false) {
      if (task.chunk_states) {
        R* kept = static_cast<R*>(task.chunk_states) + first / CHUNK * task.chunk_stride;
        for (int d = 0; d < task.K; d++) copy(kept + d * task.state_stride, S + int64_t(d) * V, task.V);
      }
      read_tokens(c, task, dt_bias, first);
      fetch_values(task, first);
      prepare<R>(c, products, task);
      fetch_outputs(task, first);
      write(task, first);
      fetch_inputs(task, first + CHUNK);
      if (task.o) output(task, first);
      if (!task.final && first + CHUNK >= task.tokens) break;  // nobody reads the last state
      products.product(scores(task), c.K, V, c.rows, {c.kT, CHUNK, 1}, u, V, S, V, Into::decay, c.total);
    }
    State<R>::write(task, S, task.final);
  }

 private:
  // What multiplies the writes, from the left.
  static INLINE Unrounded scores(const LinearTask& task) { return task.erases ? Unrounded::left : Unrounded::none; }

  // Rows are fetched shortly before they are used: those of one head fall into few sets of the cache, from where
  // they would soon be gone.
  void fetch_inputs(const LinearTask& task, int64_t first) {
    products.ahead.begin(first + CHUNK < task.tokens ? CHUNK : task.tokens - first);
    products.ahead.add(task.q.rows_from(first), task.K);
    products.ahead.add(task.k.rows_from(first), task.K);
    if (task.decay == Decay::channel) products.ahead.add(task.g.rows_from(first), task.K);
  }
  void fetch_values(const LinearTask& task, int64_t first) {
    products.ahead.begin(c.tokens);
    products.ahead.add(task.v.rows_from(first), task.v_columns);
  }
  void fetch_outputs(const LinearTask& task, int64_t first) {
    products.ahead.begin(c.tokens);
    products.ahead.add(task.o.rows_from(first), task.V);
    products.ahead.add(task.z.rows_from(first), task.V);
  }

  // What the tokens of the block at `a` find of the chunk's writes.
  void add_writes(const LinearTask& task, int a, R* o) {
    products.product(scores(task), BLOCK, V, a + BLOCK, {c.qk + a * CHUNK, CHUNK, 1}, u, V, o, V, Into::add);
  }

  // The same a token at a time, without the writes after it, and as finite writes there would leave it to the bit.
  void add_earlier_writes(const LinearTask& task, int a) {
    // The errors, which lie behind the outputs, are no longer needed.
    R *own = u + a * V, *o = from_state + a * V, *kept = from_state + c.rows * V;
    R *o_before = kept + BLOCK * V, *o_of_token = o_before + BLOCK * V;
    copy(kept, own, BLOCK * V);
    copy(o_before, o, BLOCK * V);
    for (int i = BLOCK - 1; i >= 0; i--) {
      copy(o_of_token, o_before, BLOCK * V);
      add_writes(task, a, o_of_token);
      copy(o + i * V, o_of_token + i * V, V);
      zero(own + i * V, V);
    }
    copy(own, kept, BLOCK * V);
  }

  // u, and q_start S in the first rows of from_state.
  void write(const LinearTask& task, int64_t first) {
    if (!task.erases) {
      for (int i = 0; i < c.rows; i++)
        if (i < c.tokens)
          read_row(task.v, first + i, u + i * V, task.v_columns, V);
        else
          zero(u + i * V, V);
      return;
    }
    // q and k lie behind each other; without outputs k alone is wanted.
    R* r = from_state + c.rows * V;
    if (empty) {
      if (task.o) zero(from_state, c.rows * V);
      for (int i = 0; i < c.tokens; i++) read_row(task.v, first + i, r + i * V, task.v_columns, V);
      zero(r + c.tokens * V, (c.rows - c.tokens) * V);
      return solve_errors(task, first, r);
    }
    if (task.o)
      products.product(2 * c.rows, V, c.K, {c.q, c.K, 1}, S, V, from_state, V, Into::replace);
    else
      products.product(c.rows, V, c.K, {c.k, c.K, 1}, S, V, r, V, Into::replace);
    for (int i = 0; i < c.tokens; i++) {
      R* v = u + i * V;  // as a buffer
      read_row(task.v, first + i, v, task.v_columns, V);
      for (int d = 0; d < V; d += LANES<R>) store<R>(r + i * V + d, load(v + d) - load(r + i * V + d));
    }
    solve_errors(task, first, r);
  }

  // u from r, in the place of which the errors are.
  void solve_errors(const LinearTask& task, int64_t first, R* r) {
    solve<R>(c, products, r, u, V);
    if (task.z)
      for (int i = 0; i < c.tokens; i++) write_row(task.z, first + i, r + i * V, task.V);
  }

  void output(const LinearTask& task, int64_t first) {
    if (!task.erases) {
      if (empty)
        zero(from_state, c.rows * V);
      else
        products.product(c.rows, V, c.K, {c.q, c.K, 1}, S, V, from_state, V, Into::replace);
    }
    for (int a = 0; a < c.rows; a += BLOCK) {
      // Of the block's own writes each token finds those up to its own: the others it multiplies by 0, which keeps
      // them out where they are finite.
      if (all_finite(u + a * V, BLOCK * V))
        add_writes(task, a, from_state + a * V);
      else
        add_earlier_writes(task, a);
    }
    for (int i = 0; i < c.tokens; i++) write_row(task.o, first + i, from_state + i * V, task.V);
  }
};

}  // namespace intarsia::INTARSIA_ISA
