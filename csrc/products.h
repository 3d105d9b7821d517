// Products of small matrices that lie in the cache.
#pragma once

#include "ahead.h"
#include "simd.h"

namespace intarsia::INTARSIA_ISA {

// A matrix by its strides, in numbers. As a left operand it may be read along either side, which is how a
// transposed one is given; right operands and results must have rows without gaps.
template <class R>
struct Left {
  const R* data;
  int row, column;
};

// What becomes of the result: `C = keep_i C + sign A B` with `keep` a number per row, all ones or all zeros.
enum class Into { replace, add, subtract, decay };

// Which factors are left as they are by products that round theirs (narrow.h). Where a key comes again, the delta rule
// takes back most of what was written before: the sum of the writes, each times its key, is far smaller than its terms,
// and roundings that differ from token to token would not cancel as the terms do.
enum class Unrounded { none, left, right, both };

#if INTARSIA_VECTOR_BYTES == 64
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 accumulators of 32 registers
#elif INTARSIA_VECTOR_BYTES == 32
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 of 16
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;  // 8 of 16
#endif

// Some rows of the result, from the sums of products: `acc` holds MR rows of NV vectors.
template <class R, int MR, int NV>
INLINE void put(const Vec<R> (&acc)[MR][NV], R* C, int ldc, Into into, const R* keep) {
  for (int i = 0; i < MR; i++) {
    R* c = C + int64_t(i) * ldc;
    for (int j = 0; j < NV; j++, c += LANES<R>) {
      switch (into) {
        case Into::replace: store(c, acc[i][j]); break;
        case Into::add: store<R>(c, load(c) + acc[i][j]); break;
        case Into::subtract: store<R>(c, load(c) - acc[i][j]); break;
        case Into::decay: store<R>(c, load(c) * keep[i] + acc[i][j]); break;
      }
    }
  }
}

// Products computed in the numbers' own type.
template <class R>
class Exact {
 public:
  // As Narrow has it, which needs room.
  Exact(int, Arena&) {}

  Ahead ahead;

  // What becomes of a number that products will round: of what a token writes. It is rounded before later tokens see
  // what was written, so that they correct the error.
  static INLINE Vec<R> factor(Vec<R> x) { return x; }

  void product(Unrounded, int m, int n, int k, Left<R> A, const R* B, int ldb, R* C, int ldc, Into into,
               const R* keep = nullptr) {
    product(m, n, k, A, B, ldb, C, ldc, into, keep);
  }

  // C[m, n] with A[m, k] and B[k, n]; n a multiple of the vector's lanes.
  void product(int m, int n, int k, Left<R> A, const R* B, int ldb, R* C, int ldc, Into into, const R* keep = nullptr) {
    constexpr int N = LANES<R>;
    if (!keep) keep = C;  // which is not read then
    int j = 0;
    for (; j + TILE_VECTORS * N <= n; j += TILE_VECTORS * N)
      columns<TILE_VECTORS>(m, k, A, B + j, ldb, C + j, ldc, into, keep);
    if constexpr (TILE_VECTORS > 2)
      for (; j + 2 * N <= n; j += 2 * N) columns<2>(m, k, A, B + j, ldb, C + j, ldc, into, keep);
    for (; j < n; j += N) columns<1>(m, k, A, B + j, ldb, C + j, ldc, into, keep);
  }

 private:
  template <int NV>
  INLINE void columns(int m, int k, Left<R> A, const R* B, int ldb, R* C, int ldc, Into into, const R* keep) {
    int i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS) tile<TILE_ROWS, NV>(i, k, A, B, ldb, C, ldc, into, keep);
    for (; i + 2 <= m; i += 2) tile<2, NV>(i, k, A, B, ldb, C, ldc, into, keep);
    for (; i < m; i++) tile<1, NV>(i, k, A, B, ldb, C, ldc, into, keep);
  }

  template <int MR, int NV>
  void tile(int first, int k, Left<R> A, const R* B, int ldb, R* C, int ldc, Into into, const R* keep) {
    ahead.fetch();
    Vec<R> acc[MR][NV];
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NV; j++) acc[i][j] = Vec<R>{};
    const R* a = A.data + int64_t(first) * A.row;
    for (int t = 0; t < k; t++) {
      Vec<R> b[NV];
      for (int j = 0; j < NV; j++) b[j] = load(B + int64_t(t) * ldb + j * LANES<R>);
      for (int i = 0; i < MR; i++) {
        const R x = a[int64_t(i) * A.row + int64_t(t) * A.column];
        for (int j = 0; j < NV; j++) acc[i][j] += x * b[j];
      }
    }
    put<R>(acc, C + int64_t(first) * ldc, ldc, into, keep + first);
  }
};

}  // namespace intarsia::INTARSIA_ISA
