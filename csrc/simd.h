// Vectors of one instruction set, by the compilers' own vector extension: one source serves x86 and ARM.
//
// This header and all that the kernels include is compiled once per instruction set, with other flags each time.
// Nothing here may therefore come from the C++ standard library's templates: the linker keeps one copy of an
// inline function, and it could be the copy that this machine cannot run. INTARSIA_ISA names the namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "task.h"

#ifndef INTARSIA_ISA
#error "compile the kernels with -DINTARSIA_ISA=<name> -DINTARSIA_VECTOR_BYTES=<bytes>"
#endif

namespace intarsia::INTARSIA_ISA {

constexpr int VECTOR_BYTES = INTARSIA_VECTOR_BYTES;

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
};

template <class R>
using Vec = typename VectorOf<R>::type;
template <class R>
using IntVec = typename VectorOf<R>::integer;

// How many numbers a vector holds.
template <class R>
constexpr int LANES = VECTOR_BYTES / int(sizeof(R));

template <class R>
INLINE Vec<R> load(const R* p) {
  return *reinterpret_cast<const typename VectorOf<R>::unaligned*>(p);
}
template <class R>
INLINE void store(R* p, Vec<R> v) {
  *reinterpret_cast<typename VectorOf<R>::unaligned*>(p) = v;
}
template <class R>
INLINE Vec<R> splat(R x) {
  return x - Vec<R>{};  // x - 0 and not x + 0, which would turn -0 into +0
}
// The number itself, but a product is rounded before it goes on. In `a * b + c * d` the compiler may fuse either
// product with the addition, and another one elsewhere: `a * b + rounded(c * d)` is the same everywhere.
template <class R>
INLINE Vec<R> rounded(Vec<R> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
template <class R>
INLINE Vec<R> at_least(Vec<R> x, R bound) {  // keeps NaN
  return x < splat<R>(bound) ? splat<R>(bound) : x;
}

template <class R>
INLINE IntVec<R> lane_numbers() {
  IntVec<R> numbers{};
  for (int i = 0; i < LANES<R>; i++) numbers[i] = i;
  return numbers;
}

// Lanes 0 .. N/2-1 of a and of b side by side, and the upper halves: the step of a transposition.
template <class R, int STRIDE>
INLINE void exchange(Vec<R>& a, Vec<R>& b) {
  // Blocks of STRIDE lanes: a's odd blocks change places with b's even ones.
  constexpr int N = LANES<R>;
  IntVec<R> low{}, high{};
  for (int i = 0; i < N; i++) {
    const bool odd = (i / STRIDE) % 2;
    low[i] = odd ? N + i - STRIDE : i;
    high[i] = odd ? N + i : i + STRIDE;
  }
#if defined(__clang__)
  Vec<R> x{}, y{};
  for (int i = 0; i < N; i++) {
    x[i] = low[i] < N ? a[low[i]] : b[low[i] - N];
    y[i] = high[i] < N ? a[high[i]] : b[high[i] - N];
  }
#else
  const Vec<R> x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}

template <class R, int STRIDE = LANES<R> / 2>
INLINE void transpose_lanes(Vec<R>* rows) {
  if constexpr (STRIDE >= 1) {
    for (int i = 0; i < LANES<R>; i++)
      if ((i / STRIDE) % 2 == 0) exchange<R, STRIDE>(rows[i], rows[i + STRIDE]);
    transpose_lanes<R, STRIDE / 2>(rows);
  }
}

// Lane i of the result is the sum of rows[i]'s lanes. The order of additions is fixed.
template <class R, int STRIDE = LANES<R> / 2>
INLINE Vec<R> sums_of(Vec<R>* rows) {
  if constexpr (STRIDE >= 1) {
    for (int i = 0; i < STRIDE; i++) {
      exchange<R, STRIDE>(rows[i], rows[i + STRIDE]);
      rows[i] += rows[i + STRIDE];
    }
    return sums_of<R, STRIDE / 2>(rows);
  } else {
    return rows[0];
  }
}

template <int... I>
struct Numbers {};
template <int COUNT, int... I>
struct NumbersBelow : NumbersBelow<COUNT - 1, COUNT - 1, I...> {};
template <int... I>
struct NumbersBelow<0, I...> {
  using type = Numbers<I...>;
};

// In lane i what stands in lane `from(i)` of a and b side by side. `from` captures nothing, so that the lanes are
// constants: one or two instructions.
template <class R, class From, int... I>
INLINE Vec<R> pick(Vec<R> a, Vec<R> b, From, Numbers<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From{}(I)...);
#else
  return __builtin_shuffle(a, b, IntVec<R>{From{}(I)...});
#endif
}
template <class R, class From>
INLINE Vec<R> pick(Vec<R> a, Vec<R> b, From from) {
  return pick<R>(a, b, from, typename NumbersBelow<LANES<R>>::type());
}

// Halves are added to each other until one lane is left.
template <class R, int STRIDE = LANES<R> / 2>
INLINE R sum(Vec<R> v) {
  if constexpr (STRIDE >= 1)
    return sum<R, STRIDE / 2>(v + pick<R>(v, v, [](int i) { return (i + STRIDE) % LANES<R>; }));
  else
    return v[0];
}

// `to[c][r] = from[r][c]` for rows and columns that are multiples of the vector's lanes.
template <class R>
INLINE void transpose(const R* from, int from_stride, R* to, int to_stride, int rows, int columns) {
  constexpr int N = LANES<R>;
  for (int r = 0; r < rows; r += N)
    for (int c = 0; c < columns; c += N) {
      Vec<R> tile[N];
      for (int i = 0; i < N; i++) tile[i] = load(from + int64_t(r + i) * from_stride + c);
      transpose_lanes<R>(tile);
      for (int i = 0; i < N; i++) store(to + int64_t(c + i) * to_stride + r, tile[i]);
    }
}

// --- elementary functions, each to about one unit in the last place ---

namespace detail {

// x = n ln 2 + r with |r| <= ln 2 / 2, in two steps so that r keeps all its bits; n as a number and as an integer.
INLINE Vec<float> reduce(Vec<float> x, IntVec<float>& n) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  n = (IntVec<float>)shifted - 0x4B400000;
  const Vec<float> whole = shifted - magic;
  return (x - whole * 0.693145751953125f) - whole * 1.428606765330187e-06f;
}
INLINE Vec<double> reduce(Vec<double> x, IntVec<double>& n) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634 + magic;
  n = (IntVec<double>)shifted - 0x4338000000000000;
  const Vec<double> whole = shifted - magic;
  return (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
}
// e^r for |r| <= ln 2 / 2: Taylor's polynomial, cut where the next term is below half a unit in the last place.
INLINE Vec<float> exp_small(Vec<float> r) {
  constexpr float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec<float> p = splat<float>(1.0f / 5040);
  for (float x : c) p = p * r + x;
  return p;
}
INLINE Vec<double> exp_small(Vec<double> r) {
  constexpr double c[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  Vec<double> p = splat<double>(1.0 / 6227020800);
  for (double x : c) p = p * r + x;
  return p;
}
template <class R>
struct Bits;
template <>
struct Bits<float> {
  static constexpr int MANTISSA = 23;
  static constexpr int32_t BIAS = 127;
  static constexpr float LOWEST = -104, HIGHEST = 88.8f, NORMAL = -87;
};
template <>
struct Bits<double> {
  static constexpr int MANTISSA = 52;
  static constexpr int64_t BIAS = 1023;
  static constexpr double LOWEST = -746, HIGHEST = 709.9, NORMAL = -708;
};

}  // namespace detail

// e^x; -inf gives 0, large x a large finite number or inf, NaN stays NaN.
template <class R>
INLINE Vec<R> exp(Vec<R> x) {
  using B = detail::Bits<R>;
  x = at_least<R>(x, B::LOWEST);
  x = x > splat<R>(B::HIGHEST) ? splat<R>(B::HIGHEST) : x;
  IntVec<R> n;
  const Vec<R> p = detail::exp_small(detail::reduce(x, n));
  // 2^n as two factors, so that results below the smallest normal number come out right.
  const IntVec<R> half = n >> 1;
  return p * (Vec<R>)((half + B::BIAS) << B::MANTISSA) * (Vec<R>)((n - half + B::BIAS) << B::MANTISSA);
}

// e^x for x <= 0 in fewer steps: 0 where that is below the smallest normal number.
template <class R>
INLINE Vec<R> exp_of_negative(Vec<R> x) {
  using B = detail::Bits<R>;
  IntVec<R> n;
  const Vec<R> p = detail::exp_small(detail::reduce(x, n));
  const Vec<R> y = p * (Vec<R>)((n + B::BIAS) << B::MANTISSA);
  return x < splat<R>(B::NORMAL) ? Vec<R>{} : y;
}

// ln(1 + x) for 0 <= x <= 1.
template <class R>
INLINE Vec<R> log1p(Vec<R> x) {
  // ln(1 + x) = 2 atanh(x / (2 + x)), an odd series in s = x / (2 + x) <= 1/3.
  const Vec<R> s = x / (x + R(2)), s2 = s * s;
  constexpr int TERMS = sizeof(R) == 4 ? 8 : 17;
  Vec<R> p = splat<R>(R(1) / (2 * TERMS + 1));
  for (int i = TERMS - 1; i >= 0; i--) p = p * s2 + R(1) / (2 * i + 1);
  return (s + s) * p;
}

template <class R>
INLINE Vec<R> sigmoid(Vec<R> x) {
  // By e^-|x|, which cannot overflow.
  const Vec<R> e = exp_of_negative<R>(x < R(0) ? x : -x), r = R(1) / (e + R(1));
  return x < R(0) ? e * r : r;
}

// ln(1 + e^x).
template <class R>
INLINE Vec<R> softplus(Vec<R> x) {
  const Vec<R> e = exp_of_negative<R>(x < R(0) ? x : -x);
  return (x > R(0) ? x : Vec<R>{}) + log1p<R>(e);
}

}  // namespace intarsia::INTARSIA_ISA
