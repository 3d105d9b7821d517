// Rows used where they lie if the kernel can read or write them as they are, and through a buffer if it cannot:
// another type, or a length that does not fill whole vectors.
#pragma once

#include "rows.h"

namespace intarsia::INTARSIA_ISA {

template <class R>
constexpr Dtype DTYPE_OF = sizeof(R) == 8 ? Dtype::float64 : Dtype::float32;

template <class R>
INLINE bool lies_ready(const Rows& rows, int count) {
  return rows.dtype == DTYPE_OF<R> && count % LANES<R> == 0;
}

// Row t to read: itself, or the buffer with zeros behind its `count` numbers.
template <class R>
INLINE const R* borrow_row(const Rows& rows, int64_t t, R* buffer, int count) {
  if (lies_ready<R>(rows, count)) return reinterpret_cast<const R*>(rows.data + t * rows.stride);
  read_row(rows, t, buffer, count, padded<R>(count));
  return buffer;
}

// Where to write row t: into itself, or into the buffer, from where `return_row` brings it home.
template <class R>
INLINE R* room_for_row(const Rows& rows, int64_t t, R* buffer, int count) {
  return lies_ready<R>(rows, count) ? reinterpret_cast<R*>(rows.data + t * rows.stride) : buffer;
}
template <class R>
INLINE void return_row(const Rows& rows, int64_t t, const R* room, int count) {
  if (!lies_ready<R>(rows, count)) write_row(rows, t, room, count);
}

// Numbers as they lie in memory, read and written as vectors of R: of R itself, or bfloat16 for float.
template <class R>
INLINE Vec<R> load_as(const R* p) {
  return load(p);
}
template <class R>
INLINE Vec<R> load_as(const uint16_t* p) {
  return widen(*reinterpret_cast<const UnalignedNarrowVec*>(p));
}
template <class R>
INLINE void store_as(R* p, Vec<R> x) {
  store<R>(p, x);
}
template <class R>
INLINE void store_as(uint16_t* p, Vec<R> x) {
  *reinterpret_cast<UnalignedNarrowVec*>(p) = narrow(x);
}

template <class R>
INLINE R number_as(R x) {
  return x;
}
template <class R>
INLINE R number_as(uint16_t x) {
  return widen(x);
}

// The last numbers of a row, which do not fill a vector, and `rest` behind them.
template <class R, class S>
INLINE Vec<R> load_last(const S* from, int count, R rest) {
  Vec<R> x = splat(rest);
  for (int i = 0; i < count; i++) x[i] = number_as<R>(from[i]);
  return x;
}
template <class R>
INLINE void store_number(R* to, R x) {
  *to = x;
}
template <class R>
INLINE void store_number(uint16_t* to, R x) {
  *to = narrow(float(x));
}

// The same as above for rows of S. Without a buffer's help they must lie ready: in whole vectors of that type.
template <class R, class S>
INLINE const S* borrow_row_as(const Rows& rows, int64_t t, [[maybe_unused]] R* buffer, [[maybe_unused]] int count) {
  if constexpr (sizeof(S) == sizeof(R))
    return borrow_row(rows, t, buffer, count);
  else
    return reinterpret_cast<const S*>(rows.data + t * rows.stride);
}
template <class R, class S>
INLINE S* room_for_row_as(const Rows& rows, int64_t t, [[maybe_unused]] R* buffer, [[maybe_unused]] int count) {
  if constexpr (sizeof(S) == sizeof(R))
    return room_for_row(rows, t, buffer, count);
  else
    return reinterpret_cast<S*>(rows.data + t * rows.stride);
}
template <class R, class S>
INLINE void return_row_as([[maybe_unused]] const Rows& rows, [[maybe_unused]] int64_t t, [[maybe_unused]] const S* room,
                          [[maybe_unused]] int count) {
  if constexpr (sizeof(S) == sizeof(R)) return_row<R>(rows, t, room, count);
}

// out[i] = the sum of `count` rows, first to last, `stride` numbers apart.
template <class R>
INLINE void add_rows(const R* rows, int64_t count, int64_t stride, int width, R* out) {
  for (int d = 0; d < width; d += LANES<R>) {
    Vec<R> total{};
    for (int64_t i = 0; i < count; i++) total += load(rows + i * stride + d);
    store<R>(out + d, total);
  }
}

}  // namespace intarsia::INTARSIA_ISA
