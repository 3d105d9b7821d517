// A chunk of up to 64 tokens of one head, made into matrices.
//
//   q_start, k_start   decayed from the start of the chunk to the token
//   k_endᵀ             decayed from the token to the end of the chunk
//   total              the decay of the whole chunk
//   qk[i, j], kk[i, j] the products of q_i and k_i with k_j decayed from j to i, for j <= i and j < i
//
// Every decay is a product of factors exp(g) in [0, 1]; no logarithms are subtracted, so that nothing overflows and
// a factor of 0 is a number like any other. What belongs to a token is computed from itself and from earlier tokens.
//
// With a decay for each channel the products between tokens are taken in two ways. Inside a block of 16 tokens,
// k_j is carried from token to token and decays on the way. Between blocks, the row's side decays from the start
// of its block and the column's side to that same point, and a product of matrices does the rest.
#pragma once

#include "linear_task.h"
#include "products.h"
#include "rows.h"

namespace intarsia::INTARSIA_ISA {

// The longest side of the matrices that are multiplied.
template <class R>
INLINE int longest_side(const LinearTask& task) {
  const int K = padded<R>(task.K), V = padded<R>(task.V), wider = K > V ? K : V;
  return wider > 2 * CHUNK ? wider : 2 * CHUNK;
}

template <class R>
struct Chunk {
  int K;                   // padded
  int tokens;              // that exist
  int rows;                // tokens rounded up to whole blocks; those that do not exist have q = k = 0 and do not decay
  R *q, *k;                // [rows, K] each, k behind q
  R* alpha;                // decay factors: [CHUNK, K], or [CHUNK] for a decay per head
  R* kT;                   // [K, CHUNK]
  R *qk, *kk;              // [CHUNK, CHUNK]
  R* total;                // [K]
  R* beta;                 // [CHUNK]
  R* block_k;              // [BLOCK, K]: keys decayed to the end of their block
  R* block_totals;         // [CHUNK / BLOCK, K]
  R* decays;               // [CHUNK, CHUNK], for a decay per head
  R* from_start;           // [CHUNK]
  R *q_length, *k_length;  // [CHUNK]: one over the length that q and k were divided by
  bool keeps_blocks;

  Chunk(const LinearTask& task, Arena& arena, bool keep_blocks = false) : keeps_blocks(keep_blocks) {
    K = padded<R>(task.K);
    q = arena.take<R>(2 * CHUNK * K);
    alpha = arena.take<R>(CHUNK * K);
    kT = arena.take<R>(K * CHUNK);
    qk = arena.take<R>(CHUNK * CHUNK);
    kk = arena.take<R>(CHUNK * CHUNK);
    total = arena.take<R>(K);
    beta = arena.take<R>(CHUNK);
    block_k = arena.take<R>((keep_blocks ? CHUNK : BLOCK) * K);
    block_totals = arena.take<R>(CHUNK / BLOCK * K);
    decays = arena.take<R>(CHUNK * CHUNK);
    from_start = arena.take<R>(CHUNK);
    q_length = arena.take<R>(CHUNK);
    k_length = arena.take<R>(CHUNK);
  }
};

// --- from the caller's numbers to q, k, alpha and beta ---

template <class R>
INLINE R one_over_length(const R* x, int K) {
  Vec<R> squares{};
  for (int d = 0; d < K; d += LANES<R>) squares += load(x + d) * load(x + d);
  return R(1) / R(__builtin_sqrt(double(sum<R>(squares) + R(L2NORM_EPS))));
}

template <class R>
INLINE void multiply_row(R* x, R factor, int K) {
  for (int d = 0; d < K; d += LANES<R>) store<R>(x + d, load(x + d) * factor);
}

// The decay factors exp(g) from the numbers of one token, in place.
template <class R>
INLINE void decay_factors(const LinearTask& task, const R* bias, R* x, int K) {
  for (int d = 0; d < K; d += LANES<R>) {
    Vec<R> g = load(x + d);
    if (task.gate != Gate::none) {
      if (bias) g += load(bias + d);
      g = task.gate == Gate::softplus ? softplus<R>(g) * R(-task.rate) : sigmoid<R>(g * R(task.rate)) * R(task.bound);
    }
    store<R>(x + d, exp<R>(g));
  }
}

template <class R>
INLINE void read_tokens(Chunk<R>& c, const LinearTask& task, const R* bias, int64_t first) {
  constexpr int N = LANES<R>;
  c.tokens = task.tokens - first < CHUNK ? int(task.tokens - first) : CHUNK;
  c.rows = round_up(c.tokens, BLOCK);
  c.k = c.q + c.rows * c.K;
  for (int i = 0; i < c.tokens; i++) {
    R *q = c.q + i * c.K, *k = c.k + i * c.K;
    read_row(task.q, first + i, q, task.K, c.K);
    read_row(task.k, first + i, k, task.K, c.K);
    if (task.normalize) {
      c.q_length[i] = one_over_length(q, c.K);
      c.k_length[i] = one_over_length(k, c.K);
      multiply_row(k, c.k_length[i], c.K);
    }
    multiply_row(q, R(task.scale) * (task.normalize ? c.q_length[i] : R(1)), c.K);
  }
  zero(c.q + c.tokens * c.K, (c.rows - c.tokens) * c.K);
  zero(c.k + c.tokens * c.K, (c.rows - c.tokens) * c.K);

  if (task.decay == Decay::channel) {
    for (int i = 0; i < c.rows; i++) {
      R* alpha = c.alpha + i * c.K;
      if (i < c.tokens) {
        read_row(task.g, first + i, alpha, task.K, c.K);
        decay_factors(task, bias, alpha, c.K);
      } else {
        for (int d = 0; d < c.K; d++) alpha[d] = 1;
      }
      for (int d = task.K; d < c.K; d++) alpha[d] = 1;
    }
  } else {
    for (int i = 0; i < CHUNK; i++) c.alpha[i] = 0;
    if (task.decay == Decay::head) {
      for (int i = 0; i < c.tokens; i++) {
        c.alpha[i] = read_number<R>(task.g, first + i);
        if (bias) c.alpha[i] += bias[0];
      }
      decay_factors<R>(task, nullptr, c.alpha, CHUNK);
    }
    for (int i = task.decay == Decay::head ? c.tokens : 0; i < CHUNK; i++) c.alpha[i] = 1;
  }

  if (!task.erases) return;
  for (int i = 0; i < CHUNK; i++) c.beta[i] = i < c.tokens ? read_number<R>(task.beta, first + i) : R(0);
  if (task.beta_scale > 0)
    for (int i = 0; i < CHUNK; i += N) store<R>(c.beta + i, sigmoid<R>(load(c.beta + i)) * R(task.beta_scale));
  for (int i = c.tokens; i < CHUNK; i++) c.beta[i] = 0;
}

// --- a decay for each channel ---

// Part of the products of token j with those from j on: `width` vectors of channels.
template <class R, int WIDTH>
INLINE void pair_products(const R* q, const R* k, const R* alpha, int K, int j, bool erases, Vec<R>* qk, Vec<R>* kk) {
  constexpr int N = LANES<R>;
  Vec<R> carried[WIDTH];
  for (int w = 0; w < WIDTH; w++) carried[w] = load(k + j * K + w * N);
  for (int i = j;;) {
    Vec<R> with_q = qk[i];
    for (int w = 0; w < WIDTH; w++) with_q += load(q + i * K + w * N) * carried[w];
    qk[i] = with_q;
    if (erases && i > j) {
      Vec<R> with_k = kk[i];
      for (int w = 0; w < WIDTH; w++) with_k += load(k + i * K + w * N) * carried[w];
      kk[i] = with_k;
    }
    if (++i == BLOCK) break;
    for (int w = 0; w < WIDTH; w++) carried[w] *= load(alpha + i * K + w * N);
  }
}

// The products of the tokens of one block with each other.
template <class R>
void block_products(const R* q, const R* k, const R* alpha, int K, bool erases, R* qk, R* kk) {
  constexpr int N = LANES<R>, WIDTH = VECTOR_BYTES == 64 ? 8 : 4;
  alignas(64) R by_column[2][BLOCK * BLOCK];
  for (int j = 0; j < BLOCK; j++) {
    Vec<R> sums[2][BLOCK];
    for (int i = 0; i < BLOCK; i++) sums[0][i] = sums[1][i] = Vec<R>{};
    int d = 0;
    for (; d + WIDTH * N <= K; d += WIDTH * N)
      pair_products<R, WIDTH>(q + d, k + d, alpha + d, K, j, erases, sums[0], sums[1]);
    for (; d + 2 * N <= K; d += 2 * N) pair_products<R, 2>(q + d, k + d, alpha + d, K, j, erases, sums[0], sums[1]);
    for (; d < K; d += N) pair_products<R, 1>(q + d, k + d, alpha + d, K, j, erases, sums[0], sums[1]);
    for (int s = 0; s < 1 + erases; s++)
      for (int i = 0; i < BLOCK; i += N) store<R>(by_column[s] + j * BLOCK + i, sums_of<R>(sums[s] + i));
  }
  transpose<R>(by_column[0], BLOCK, qk, CHUNK, BLOCK, BLOCK);
  if (erases) transpose<R>(by_column[1], BLOCK, kk, CHUNK, BLOCK, BLOCK);
}

// Calls work(Width, d) for the channels from d on, some vectors at a time, so that walks over the tokens read lines of
// the cache side by side.
template <int WIDTH>
struct Width {
  static constexpr int value = WIDTH;
};
template <class R, class Work>
INLINE void by_channels(int K, Work work) {
  constexpr int N = LANES<R>, WIDTH = 4;
  int d = 0;
  for (; d + WIDTH * N <= K; d += WIDTH * N) work(Width<WIDTH>{}, d);
  for (; d + 2 * N <= K; d += 2 * N) work(Width<2>{}, d);
  for (; d < K; d += N) work(Width<1>{}, d);
}

// q and k of a block decay from its start, the keys in block_k to its end.
template <class R>
INLINE void anchor_block(R* q, R* k, const R* alpha, R* block_k, R* total, int K) {
  constexpr int N = LANES<R>;
  by_channels<R>(K, [=](auto width, int first) {
    constexpr int W = decltype(width)::value;
    Vec<R> decay[W];
    for (int w = 0; w < W; w++) decay[w] = splat<R>(1);
    for (int i = BLOCK - 1; i >= 0; i--)
      for (int w = 0; w < W; w++) {
        const int at = i * K + first + w * N;
        store<R>(block_k + at, load(k + at) * decay[w]);
        decay[w] *= load(alpha + at);
      }
    for (int w = 0; w < W; w++) decay[w] = splat<R>(1);
    for (int i = 0; i < BLOCK; i++)
      for (int w = 0; w < W; w++) {
        const int at = i * K + first + w * N;
        decay[w] *= load(alpha + at);
        store<R>(q + at, load(q + at) * decay[w]);
        store<R>(k + at, load(k + at) * decay[w]);
      }
    for (int w = 0; w < W; w++) store<R>(total + first + w * N, decay[w]);
  });
}

template <class R>
INLINE void decay_columns(R* kT, const R* decay, int K, int columns) {
  for (int d = 0; d < K; d++)
    for (int j = 0; j < columns; j += LANES<R>) store<R>(kT + d * CHUNK + j, load(kT + d * CHUNK + j) * decay[d]);
}

// q and k decay from the start of their block; the rest is as a chunk has it.
template <class R, class Products>
void prepare_blocks(Chunk<R>& c, Products& products, bool erases) {
  const int K = c.K, blocks = c.rows / BLOCK;
  for (int a = 0; a < blocks; a++) {
    const int first = a * BLOCK;
    R *q = c.q + first * K, *k = c.k + first * K, *alpha = c.alpha + first * K, *total = c.block_totals + a * K;
    R* block_k = c.block_k + (c.keeps_blocks ? first * K : 0);
    block_products<R>(q, k, alpha, K, erases, c.qk + first * CHUNK + first, c.kk + first * CHUNK + first);
    anchor_block<R>(q, k, alpha, block_k, total, K);
    // The columns so far have been decayed to the start of this block.
    if (a > 0) {
      products.product(erases ? Unrounded::right : Unrounded::none, BLOCK, first, K, {q, K, 1}, c.kT, CHUNK,
                       c.qk + first * CHUNK, CHUNK, Into::replace);
      if (erases)
        products.product(Unrounded::right, BLOCK, first, K, {k, K, 1}, c.kT, CHUNK, c.kk + first * CHUNK, CHUNK,
                         Into::replace);
      decay_columns<R>(c.kT, total, K, first);
    }
    transpose<R>(block_k, K, c.kT + first, CHUNK, BLOCK, K);
  }
}

// From the start of the block to the start of the chunk.
template <class R>
INLINE void anchor_chunk(Chunk<R>& c, bool erases) {
  const int K = c.K;
  copy(c.total, c.block_totals, K);
  for (int a = 1; a < c.rows / BLOCK; a++)
    for (int d = 0; d < K; d += LANES<R>) {
      const Vec<R> before = load(c.total + d);
      for (int i = a * BLOCK; i < (a + 1) * BLOCK; i++) {
        store<R>(c.q + i * K + d, load(c.q + i * K + d) * before);
        if (erases) store<R>(c.k + i * K + d, load(c.k + i * K + d) * before);
      }
      store<R>(c.total + d, before * load(c.block_totals + a * K + d));
    }
}

// --- one decay for the whole head, or none ---

template <class R>
INLINE void decays_between(Chunk<R>& c) {
  constexpr int N = LANES<R>;
  R start = 1;
  for (int i = 0; i < c.rows; i++) {
    R* row = c.decays + i * CHUNK;
    for (int j = 0; j < CHUNK; j += N) store<R>(row + j, i ? load(row - CHUNK + j) * c.alpha[i] : Vec<R>{});
    row[i] = 1;
    c.from_start[i] = start *= c.alpha[i];
  }
  for (int d = 0; d < c.K; d++) c.total[d] = start;
}

// q and k stay as they are.
template <class R, class Products>
void prepare_head(Chunk<R>& c, Products& products, bool erases, bool decays) {
  constexpr int N = LANES<R>;
  const int K = c.K;
  decays_between(c);
  for (int first = 0; first < c.rows; first += BLOCK) transpose<R>(c.k + first * K, K, c.kT + first, CHUNK, BLOCK, K);
  for (int first = 0; first < c.rows; first += BLOCK) {
    const int columns = first + BLOCK;
    products.product(BLOCK, columns, K, {c.q + first * K, K, 1}, c.kT, CHUNK, c.qk + first * CHUNK, CHUNK,
                     Into::replace);
    if (erases)
      products.product(BLOCK, columns, K, {c.k + first * K, K, 1}, c.kT, CHUNK, c.kk + first * CHUNK, CHUNK,
                       Into::replace);
    for (int i = first; i < first + BLOCK; i++)
      for (int j = 0; j < columns; j += N) {
        const Vec<R> decay = load(c.decays + i * CHUNK + j);
        Vec<R> qk = load(c.qk + i * CHUNK + j) * decay;
        // A later key may have made it infinite, which a decay of 0 makes NaN.
        if (j + N > i + 1) qk = lane_numbers<R>() + j > i ? Vec<R>{} : qk;
        store<R>(c.qk + i * CHUNK + j, qk);
        if (erases) store<R>(c.kk + i * CHUNK + j, load(c.kk + i * CHUNK + j) * decay);
      }
  }
  if (!decays) return;
  const R* to_end = c.decays + (c.rows - 1) * CHUNK;
  for (int d = 0; d < K; d++)
    for (int j = 0; j < c.rows; j += N) store<R>(c.kT + d * CHUNK + j, load(c.kT + d * CHUNK + j) * load(to_end + j));
}

template <class R>
INLINE void anchor_head(Chunk<R>& c, bool erases) {
  for (int i = 0; i < c.rows; i++) {
    multiply_row(c.q + i * c.K, c.from_start[i], c.K);
    if (erases) multiply_row(c.k + i * c.K, c.from_start[i], c.K);
  }
}

template <class R, class Products>
INLINE void prepare(Chunk<R>& c, Products& products, const LinearTask& task) {
  if (task.decay == Decay::channel) {
    prepare_blocks<R>(c, products, task.erases);
    anchor_chunk<R>(c, task.erases);
  } else {
    prepare_head<R>(c, products, task.erases, task.decay == Decay::head);
    if (task.decay == Decay::head) anchor_head<R>(c, task.erases);
  }
}

}  // namespace intarsia::INTARSIA_ISA
