// Products whose factors are rounded to bfloat16 and whose sums are float32, as processors with AVX512-BF16 or AMX
// take them: in pairs of neighbours along the inner side, two bfloat16 in 32 bits.
#pragma once

#include <immintrin.h>

#include "products.h"
#ifdef INTARSIA_TILES
#include "tiles.h"
#endif

namespace intarsia::INTARSIA_ISA {

class Narrow : public Exact<float> {
 public:
  // For matrices whose sides are at most `side`.
  Narrow(int side, Arena& arena) : Exact<float>(side, arena) {
    const int64_t pairs = int64_t(side) * whole_steps(side) / 2;
    left_ = arena.take<uint32_t>(pairs);
    right_ = arena.take<uint32_t>(pairs);
  }

  static INLINE Vec<float> factor(Vec<float> x) { return rounded_to_narrow(x); }

  // As Exact has it; m and k multiples of 16.
  void product(int m, int n, int k, Left<float> A, const float* B, int ldb, float* C, int ldc, Into into,
               const float* keep = nullptr) {
    pack_left<Part::high>(m, k, A);
    pack_right<Part::high>(k, n, B, ldb);
    multiply(m, n, k, C, ldc, into, keep ? keep : C);  // which is not read then
  }

  // The same with some factors unrounded: as the sum of two bfloat16, their high and low part. Without tiles two
  // products of bfloat16 take as long as one of float32, which then is taken.
  void product(Unrounded factors, int m, int n, int k, Left<float> A, const float* B, int ldb, float* C, int ldc,
               Into into, const float* keep = nullptr) {
#ifdef INTARSIA_TILES
    product(m, n, k, A, B, ldb, C, ldc, into, keep);
    const Into more = into == Into::subtract ? into : Into::add;
    if (factors == Unrounded::left || factors == Unrounded::both) {
      pack_left<Part::low>(m, k, A);
      multiply(m, n, k, C, ldc, more, C);
    }
    if (factors == Unrounded::right || factors == Unrounded::both) {
      if (factors == Unrounded::both) pack_left<Part::high>(m, k, A);
      pack_right<Part::low>(k, n, B, ldb);
      multiply(m, n, k, C, ldc, more, C);
    }
#else
    if (factors == Unrounded::none)
      product(m, n, k, A, B, ldb, C, ldc, into, keep);
    else
      Exact<float>::product(m, n, k, A, B, ldb, C, ldc, into, keep);
#endif
  }

 private:
  static constexpr int N = LANES<float>;
  static_assert(N == 16);
  uint32_t *left_, *right_;

  // A number is the sum of its high part, a bfloat16, and of the rest, of which the low part is the nearest bfloat16.
  enum class Part { high, low };

  static INLINE Vec<float> rounded_to_narrow(Vec<float> x) { return widen((NarrowVec)_mm512_cvtneps_pbh((__m512)x)); }
  template <Part PART>
  static INLINE Vec<float> part(Vec<float> x) {
    return PART == Part::high ? x : x - rounded_to_narrow(x);
  }

  // The inner side comes in steps of 32 numbers, or 16 pairs: what fills a vector, or a row of a tile.
  static constexpr int whole_steps(int k) { return (k + 31) / 32 * 32; }

  static INLINE __m512i narrowed(Vec<float> low, Vec<float> high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }

  template <Part PART>
  INLINE void pack_left(int m, int k, Left<float> A) {
    A.column == 1 ? pack_rows<PART>(m, k, A.data, A.row) : pack_transposed<PART>(m, k, A.data, A.column);
  }

  // left_[i][t] = A[i][2 t], A[i][2 t + 1]; zeros behind k.
  template <Part PART>
  void pack_rows(int m, int k, const float* A, int stride) {
    const int pairs = whole_steps(k) / 2;
    for (int i = 0; i < m; i++) {
      const float* a = A + int64_t(i) * stride;
      uint32_t* to = left_ + i * pairs;
      int t = 0;
      for (; t + 2 * N <= k; t += 2 * N)
        _mm512_storeu_si512(to + t / 2, narrowed(part<PART>(load(a + t)), part<PART>(load(a + t + N))));
      if (t < k) _mm512_storeu_si512(to + t / 2, narrowed(part<PART>(load(a + t)), Vec<float>{}));
    }
  }

  // Rows 2 t and 2 t + 1 side by side: lane i holds the pair (low[i], high[i]).
  static INLINE __m512i interleaved(Vec<float> low, Vec<float> high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, narrowed(low, high));
  }

  // The same from A's transpose, whose rows are `stride` apart.
  template <Part PART>
  void pack_transposed(int m, int k, const float* A, int stride) {
    const int pairs = whole_steps(k) / 2;
    for (int t = 0; t < pairs; t += N)
      for (int i = 0; i < m; i += N) {
        Vec<float> tile[N];
        for (int s = 0; s < N; s++) {
          const float* a = A + int64_t(2 * (t + s)) * stride + i;
          tile[s] = 2 * (t + s) < k ? (Vec<float>)interleaved(part<PART>(load(a)), part<PART>(load(a + stride)))
                                    : Vec<float>{};
        }
        transpose_lanes<float>(tile);
        for (int s = 0; s < N; s++) store(reinterpret_cast<float*>(left_) + (i + s) * pairs + t, tile[s]);
      }
  }

  // right_[t][j] = B[2 t][j], B[2 t + 1][j]; zeros behind k.
  template <Part PART>
  void pack_right(int k, int n, const float* B, int ldb) {
    for (int t = 0; t < k; t += 2) {
      const float* b = B + int64_t(t) * ldb;
      for (int j = 0; j < n; j += N)
        _mm512_storeu_si512(right_ + t / 2 * n + j,
                            interleaved(part<PART>(load(b + j)), part<PART>(load(b + ldb + j))));
    }
#ifdef INTARSIA_TILES
    zero(right_ + k / 2 * n, (whole_steps(k) - k) / 2 * n);
#endif
  }

#ifdef INTARSIA_TILES

  void multiply(int m, int n, int k, float* C, int ldc, Into into, const float* keep) {
    const int pairs = whole_steps(k) / 2;
    for (int i = 0; i < m;) {
      const int rows = i + 2 * N <= m ? 2 : 1;
      for (int j = 0; j < n;) {
        const int columns = j + 2 * N <= n ? 2 : 1;
        float* c = C + int64_t(i) * ldc + j;
        rows == 2 ? (columns == 2 ? tiles<2, 2>(i, j, pairs, n, c, ldc, into, keep + i)
                                  : tiles<2, 1>(i, j, pairs, n, c, ldc, into, keep + i))
                  : (columns == 2 ? tiles<1, 2>(i, j, pairs, n, c, ldc, into, keep + i)
                                  : tiles<1, 1>(i, j, pairs, n, c, ldc, into, keep + i));
        j += columns * N;
      }
      i += rows * N;
    }
  }

  // ROWS x COLUMNS tiles of 16 x 16 sums, in the registers 0 .. 3; factors in 4, 5 (left) and 6, 7 (right).
  template <int ROWS, int COLUMNS>
  void tiles(int i, int j, int pairs, int n, float* C, int ldc, Into into, const float* keep) {
    ahead.fetch();
    ahead.fetch();
    Tiles t;
    const uint32_t *a = left_ + i * pairs, *b = right_ + j;
    t.zero<0>();
    if constexpr (COLUMNS == 2) t.zero<1>();
    if constexpr (ROWS == 2) t.zero<2>();
    if constexpr (ROWS * COLUMNS == 4) t.zero<3>();
    for (int s = 0; s < pairs; s += N) {
      t.load<4>(a + s, pairs * 4);
      t.load<6>(b + s * n, n * 4);
      t.add_product<0, 4, 6>();
      if constexpr (COLUMNS == 2) {
        t.load<7>(b + s * n + N, n * 4);
        t.add_product<1, 4, 7>();
      }
      if constexpr (ROWS == 2) {
        t.load<5>(a + N * pairs + s, pairs * 4);
        t.add_product<2, 5, 6>();
      }
      if constexpr (ROWS * COLUMNS == 4) t.add_product<3, 5, 7>();
    }
    if (into == Into::replace) {
      t.store<0>(C, ldc * 4);
      if constexpr (COLUMNS == 2) t.store<1>(C + N, ldc * 4);
      if constexpr (ROWS == 2) t.store<2>(C + N * ldc, ldc * 4);
      if constexpr (ROWS * COLUMNS == 4) t.store<3>(C + N * ldc + N, ldc * 4);
      return;
    }
    alignas(64) float sums[4][N * N];
    t.store<0>(sums[0], N * 4);
    if constexpr (COLUMNS == 2) t.store<1>(sums[1], N * 4);
    if constexpr (ROWS == 2) t.store<2>(sums[2], N * 4);
    if constexpr (ROWS * COLUMNS == 4) t.store<3>(sums[3], N * 4);
    for (int r = 0; r < ROWS * N; r++) {
      Vec<float> acc[1][COLUMNS];
      for (int v = 0; v < COLUMNS; v++) acc[0][v] = load(sums[r / N * 2 + v] + r % N * N);
      put<float>(acc, C + int64_t(r) * ldc, ldc, into, keep + r);
    }
  }

#else

  void multiply(int m, int n, int k, float* C, int ldc, Into into, const float* keep) {
    int j = 0;
    for (; j + 4 * N <= n; j += 4 * N) columns<4>(m, k, j, n, C + j, ldc, into, keep);
    for (; j + 2 * N <= n; j += 2 * N) columns<2>(m, k, j, n, C + j, ldc, into, keep);
    for (; j < n; j += N) columns<1>(m, k, j, n, C + j, ldc, into, keep);
  }

  template <int NV>
  INLINE void columns(int m, int k, int j, int n, float* C, int ldc, Into into, const float* keep) {
    int i = 0;
    for (; i + 6 <= m; i += 6) tile<6, NV>(i, k, j, n, C, ldc, into, keep);
    for (; i + 4 <= m; i += 4) tile<4, NV>(i, k, j, n, C, ldc, into, keep);
    for (; i + 2 <= m; i += 2) tile<2, NV>(i, k, j, n, C, ldc, into, keep);
  }

  template <int MR, int NV>
  void tile(int first, int k, int j, int n, float* C, int ldc, Into into, const float* keep) {
    ahead.fetch();
    const int pairs = whole_steps(k) / 2;
    const uint32_t *a = left_ + first * pairs, *b = right_ + j;
    __m512 acc[MR][NV];
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) acc[r][v] = _mm512_setzero_ps();
    for (int t = 0; t < k / 2; t++, b += n) {
      __m512bh right[NV];
      for (int v = 0; v < NV; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + v * N);
      for (int r = 0; r < MR; r++) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[r * pairs + t]));
        for (int v = 0; v < NV; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], left, right[v]);
      }
    }
    Vec<float> sums[MR][NV];
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) sums[r][v] = (Vec<float>)acc[r][v];
    put<float>(sums, C + int64_t(first) * ldc, ldc, into, keep + first);
  }

#endif
};

}  // namespace intarsia::INTARSIA_ISA
