// Sigmoid and SiLU with their derivatives.
#pragma once

#include "simd.h"

namespace intarsia::INTARSIA_ISA {

// e^-x for what is made of it here: 0 instead of what is below the smallest normal number, infinity from about its
// inverse on. NaN stays NaN.
INLINE Vec<float> exp_of_minus(Vec<float> x) {
  // Outside these bounds 2^n is 0 or infinity: all bits of its exponent are 0 or 1.
  x = x > splat(88.0f) ? splat(88.0f) : x;
  x = x < splat(-89.0f) ? splat(-89.0f) : x;
  const float magic = 12582912.0f;  // see simd.h, which has the general form
  const Vec<float> shifted = magic - x * 1.44269504088896341f, n = shifted - magic;
  const Vec<float> r = -(x + n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  return detail::exp_small(r) * (Vec<float>)(((IntVec<float>)shifted << 23) + (127 << 23));
}
INLINE Vec<double> exp_of_minus(Vec<double> x) {
  x = x > splat(709.0) ? splat(709.0) : x;
  x = x < splat(-710.0) ? splat(-710.0) : x;
  const double magic = 6755399441055744.0;
  const Vec<double> shifted = magic - x * 1.4426950408889634, n = shifted - magic;
  const Vec<double> r = -(x + n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  return detail::exp_small(r) * (Vec<double>)(((IntVec<double>)shifted << 52) + (int64_t(1023) << 52));
}

// sigmoid(x), and 1 - sigmoid(x), which a subtraction would not give to full precision.
template <class R>
struct Sigmoid {
  Vec<R> e, value;

  INLINE explicit Sigmoid(Vec<R> x) : e(exp_of_minus(x)), value(R(1) / (e + R(1))) {}
  INLINE Vec<R> rest() const {
    // Where e is infinite `value` is 0, and the gradients are.
    const Vec<R> large = splat(sizeof(R) == 4 ? R(1e38f) : R(1e307));
    return value * (e > large ? large : e);
  }
  INLINE Vec<R> derivative() const { return value * rest(); }
};

template <class R>
INLINE Vec<R> silu(Vec<R> x) {
  return x / (exp_of_minus(x) + R(1));
}

// SiLU's derivative at x, whose sigmoid is given.
template <class R>
INLINE Vec<R> silu_derivative(Vec<R> x, const Sigmoid<R>& s) {
  return s.value * (x * s.rest() + R(1));
}

}  // namespace intarsia::INTARSIA_ISA
