// Rows of numbers in and out of the kernels' own type.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd.h"
#include "task.h"

namespace intarsia::INTARSIA_ISA {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Rows in scratch are padded with zeros to whole vectors.
template <class R>
constexpr int padded(int n) {
  return round_up(n, LANES<R>);
}

INLINE float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}
// To the nearest bfloat16, ties to even.
INLINE uint16_t narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? uint16_t((bits >> 16) | 0x40) : uint16_t(rounded);
}

typedef uint16_t NarrowVec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t UnalignedNarrowVec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t BitsVec __attribute__((vector_size(VECTOR_BYTES)));

// The same for a vector. GCC makes six instructions of a conversion that x86 has in one (with a mask, as GCC 12 warns
// of the form without).
INLINE Vec<float> widen(NarrowVec bits) {
#if defined(__AVX512F__)
  const BitsVec wide = (BitsVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
  const BitsVec wide = (BitsVec)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  const BitsVec wide = __builtin_convertvector(bits, BitsVec);
#endif
  return (Vec<float>)(wide << 16);
}
INLINE NarrowVec narrow(Vec<float> x) {
  const BitsVec bits = (BitsVec)x, high = bits >> 16;
  const BitsVec rounded = (bits + (high & 1) + 0x7fff) >> 16;
  return __builtin_convertvector(x != x ? high | 0x40 : rounded, NarrowVec);
}

template <class R, class From>
INLINE void convert_row(const From* from, int count, R* to) {
  for (int i = 0; i < count; i++) to[i] = R(from[i]);
}
template <class R>
INLINE void widen_row(const uint16_t* from, int count, R* to) {
  int i = 0;
  if constexpr (sizeof(R) == 4)
    for (; i + LANES<float> <= count; i += LANES<float>)
      store<float>(to + i, widen(*reinterpret_cast<const UnalignedNarrowVec*>(from + i)));
  for (; i < count; i++) to[i] = widen(from[i]);
}
template <class R>
INLINE void narrow_row(const R* from, int count, uint16_t* to) {
  int i = 0;
  if constexpr (sizeof(R) == 4)
    for (; i + LANES<float> <= count; i += LANES<float>)
      *reinterpret_cast<UnalignedNarrowVec*>(to + i) = narrow(load(from + i));
  for (; i < count; i++) to[i] = narrow(float(from[i]));
}

// The first `count` numbers of row t, then zeros up to `padded`.
template <class R>
INLINE void read_row(const Rows& rows, int64_t t, R* to, int count, int padded) {
  const char* from = rows.data + t * rows.stride;
  if (rows.dtype == Dtype::bfloat16)
    widen_row(reinterpret_cast<const uint16_t*>(from), count, to);
  else if (rows.dtype == Dtype::float64)
    convert_row(reinterpret_cast<const double*>(from), count, to);
  else
    convert_row(reinterpret_cast<const float*>(from), count, to);
  for (int i = count; i < padded; i++) to[i] = 0;
}

template <class R>
INLINE void write_row(const Rows& rows, int64_t t, const R* from, int count) {
  char* to = rows.data + t * rows.stride;
  if (rows.dtype == Dtype::bfloat16)
    narrow_row(from, count, reinterpret_cast<uint16_t*>(to));
  else if (rows.dtype == Dtype::float64)
    convert_row(from, count, reinterpret_cast<double*>(to));
  else
    convert_row(from, count, reinterpret_cast<float*>(to));
}

template <class R>
INLINE R read_number(const Rows& rows, int64_t t) {
  R x;
  read_row<R>(rows, t, &x, 1, 1);
  return x;
}
template <class R>
INLINE void write_number(const Rows& rows, int64_t t, R x) {
  write_row<R>(rows, t, &x, 1);
}

// Of whole vectors.
template <class R>
INLINE bool all_finite(const R* x, int count) {
  Vec<R> zeros{};  // or NaN
  for (int i = 0; i < count; i += LANES<R>) zeros += load(x + i) * R(0);
  return sum<R>(zeros) == R(0);
}

template <class R>
INLINE void zero(R* p, int64_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(R));
}
template <class R>
INLINE void copy(R* to, const R* from, int64_t count) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(R));
}

}  // namespace intarsia::INTARSIA_ISA
