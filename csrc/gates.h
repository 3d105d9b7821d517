// Sigmoid and SiLU with their derivatives.
#pragma once

#include "simd.h"

namespace intarsia::INTARSIA_ISA {

// sigmoid(x) and 1 - sigmoid(x), which a subtraction would not give to full precision.
template <class R>
struct Sigmoid {
  Vec<R> value, rest;

  INLINE explicit Sigmoid(Vec<R> x) {
    // By e^-|x|, which cannot overflow.
    const Vec<R> e = exp<R>(x < R(0) ? x : -x), large = R(1) / (e + R(1)), small = e * large;
    value = x < R(0) ? small : large;
    rest = x < R(0) ? large : small;
  }
  INLINE Vec<R> derivative() const { return value * rest; }
};

// SiLU's derivative at x, whose sigmoid is given.
template <class R>
INLINE Vec<R> silu_derivative(Vec<R> x, const Sigmoid<R>& s) {
  return s.value * (x * s.rest + R(1));
}

}  // namespace intarsia::INTARSIA_ISA
