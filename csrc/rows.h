// Rows of numbers in and out of the kernels' own type.
#pragma once

#include "simd.h"
#include "task.h"

namespace intarsia::INTARSIA_ISA {

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

// The first `count` numbers of row t, then zeros up to `padded`.
template <class R>
INLINE void read_row(const Rows& rows, int64_t t, R* to, int count, int padded) {
  const char* from = rows.data + t * rows.stride;
  if (rows.dtype == Dtype::bfloat16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; i++) to[i] = widen(p[i]);
  } else if (rows.dtype == Dtype::float64) {
    const double* p = reinterpret_cast<const double*>(from);
    for (int i = 0; i < count; i++) to[i] = R(p[i]);
  } else {
    const float* p = reinterpret_cast<const float*>(from);
    for (int i = 0; i < count; i++) to[i] = p[i];
  }
  for (int i = count; i < padded; i++) to[i] = 0;
}

template <class R>
INLINE void write_row(const Rows& rows, int64_t t, const R* from, int count) {
  char* to = rows.data + t * rows.stride;
  if (rows.dtype == Dtype::bfloat16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; i++) p[i] = narrow(float(from[i]));
  } else if (rows.dtype == Dtype::float64) {
    double* p = reinterpret_cast<double*>(to);
    for (int i = 0; i < count; i++) p[i] = from[i];
  } else {
    float* p = reinterpret_cast<float*>(to);
    for (int i = 0; i < count; i++) p[i] = float(from[i]);
  }
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

template <class R>
INLINE void zero(R* p, int64_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(R));
}
template <class R>
INLINE void copy(R* to, const R* from, int64_t count) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(R));
}

}  // namespace intarsia::INTARSIA_ISA
