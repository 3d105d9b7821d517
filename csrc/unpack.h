// Rows of numbers that lie in memory in some form, in steps as products along them take them.
#pragma once

#include "rows.h"

namespace intarsia::INTARSIA_ISA {

constexpr int STEP = 32, VECTORS = STEP / LANES<float>, HALF = VECTORS / 2;

typedef uint32_t UnalignedBits __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

INLINE BitsVec load_bits(const char* p) { return *reinterpret_cast<const UnalignedBits*>(p); }

// Kinds of weights. `unpack` gives a step of them, from number k of a row on, and `add` their products with x to
// `Sums`; `vector` gives vector I of those that begin at `block`, `of_x` the same of x, and `multiply` adds their
// product. A prepared row of x has the numbers of a step in the order in which they come out of 32 bits that hold PARTS
// weights: of 2, first the even ones and then the odd ones. PAIRS says that they are bfloat16 there and not float32.

// The vectors of W from FIRST on: a step.
template <class W, int FIRST = 0, int I = 0>
INLINE void vectors_of(const char* block, Vec<float> (&to)[VECTORS]) {
  if constexpr (I < VECTORS) {
    to[I] = W::template vector<FIRST + I>(block);
    vectors_of<W, FIRST, I + 1>(block, to);
  }
}

// As float32.
template <int PARTS_>
struct Wide {
  static constexpr int PARTS = PARTS_;
  static constexpr bool PAIRS = false;
  static constexpr int NUMBERS = STEP, X_BYTES = 4, COUNT = VECTORS;
  using Sums = Vec<float>;
  Vec<float> at[VECTORS];

  template <int I>
  static INLINE Vec<float> of_x(const char* x, int64_t k) {
    return load(reinterpret_cast<const float*>(x) + k + I * LANES<float>);
  }
  static INLINE void multiply(Vec<float>& sum, Vec<float> w, Vec<float> x) { sum += w * x; }

  INLINE void add(Vec<float>& sum, const char* x, int64_t k) const {
    for (int i = 0; i < VECTORS; i++) sum += load(reinterpret_cast<const float*>(x) + k + i * LANES<float>) * at[i];
  }
};

struct Float32 : Wide<1> {
  static constexpr int BYTES = 4;
  static INLINE Float32 unpack(const char* row, int64_t k) {
    Float32 w;
    vectors_of<Float32>(row + BYTES * k, w.at);
    return w;
  }
  template <int I>
  static INLINE Vec<float> vector(const char* block) {
    return of_x<I>(block, 0);
  }
};

struct Bfloat16 : Wide<2> {
  static constexpr int BYTES = 2;
  static INLINE Bfloat16 unpack(const char* row, int64_t k) {
    Bfloat16 w;
    vectors_of<Bfloat16>(row + BYTES * k, w.at);
    return w;
  }
  template <int I>
  static INLINE Vec<float> vector(const char* block) {
    const BitsVec pair = load_bits(block + I % HALF * VECTOR_BYTES);
    return (Vec<float>)(I < HALF ? pair << 16 : pair & 0xffff0000);
  }
};

#if defined(__AVX512BF16__)

// As bfloat16, for rows of x that are bfloat16: products of pairs.
struct Pairs {
  static constexpr int PARTS = 1;
  static constexpr bool PAIRS = true;
  static constexpr int NUMBERS = STEP, X_BYTES = 2, COUNT = 1;
  using Sums = Vec<float>;
  __m512i at;

  template <int>
  static INLINE __m512i of_x(const char* x, int64_t k) {
    return _mm512_loadu_si512(x + 2 * k);
  }
  static INLINE void multiply(Vec<float>& sum, __m512i w, __m512i x) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }

  INLINE void add(Vec<float>& sum, const char* x, int64_t k) const { multiply(sum, at, of_x<0>(x, k)); }
};

struct Bfloat16Pairs : Pairs {
  static constexpr int BYTES = 2;
  static INLINE Bfloat16Pairs unpack(const char* row, int64_t k) { return {{of_x<0>(row, k)}}; }
  template <int I>
  static INLINE __m512i vector(const char* block) {
    return of_x<I>(block, 0);
  }
};

using Bfloat16OfNarrow = Bfloat16Pairs;

#else

using Bfloat16OfNarrow = Bfloat16;

#endif

// A step of x in the order that FORM wants.
template <class FORM>
INLINE void reorder(float* numbers) {
  if constexpr (FORM::PARTS > 1) {
    float step[STEP];
    copy(step, numbers, STEP);
    constexpr int EACH = STEP / FORM::PARTS;
    for (int i = 0; i < STEP; i++) numbers[i] = step[i % EACH * FORM::PARTS + i / EACH];
  }
}

// A row of x of K numbers with zeros up to `padded`, in the order and type that FORM wants.
template <class FORM>
INLINE void prepare_row(const Rows& x, int64_t row, char* to, int64_t K, int64_t padded) {
  if constexpr (FORM::PAIRS) {
    copy(to, x.data + row * x.stride, 2 * K);
    zero(to + 2 * K, 2 * (padded - K));
  } else {
    read_row(x, row, reinterpret_cast<float*>(to), int(K), int(padded));
    for (int64_t k = 0; k < padded; k += STEP) reorder<FORM>(reinterpret_cast<float*>(to) + k);
  }
}

}  // namespace intarsia::INTARSIA_ISA
