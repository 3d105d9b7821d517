// Weights of 8 and 4 bits, as products with few rows take them.
#pragma once

#include "few_rows_task.h"
#include "unpack.h"

namespace intarsia::INTARSIA_ISA {

#if defined(__AVX2__)
struct Int8 : Wide<1> {
  static constexpr int BYTES = 1, BLOCK = STEP, BLOCK_BYTES = STEP;
  template <int I>
  static INLINE Vec<float> vector(const char* block) {
    const __m128i* p = reinterpret_cast<const __m128i*>(block + I * LANES<float>);
#if defined(__AVX512F__)
    const __m512i numbers = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(p));
#else
    const __m256i numbers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p));
#endif
    return __builtin_convertvector((IntVec<float>)numbers, Vec<float>);
  }
};
#else
struct Int8 : Wide<4> {
  static constexpr int BYTES = 1, BLOCK = STEP, BLOCK_BYTES = STEP;
  template <int I>
  static INLINE Vec<float> vector(const char* block) {
    constexpr int QUARTER = VECTORS / 4;
    const BitsVec four = load_bits(block + I % QUARTER * VECTOR_BYTES);
    return __builtin_convertvector((IntVec<float>)(four << (24 - 8 * (I / QUARTER))) >> 24, Vec<float>);
  }
};
#endif

// Of int4 a block has four steps.
struct Int4 : Wide<2> {
  static constexpr int BLOCK = INT4_BLOCK, BLOCK_BYTES = INT4_BLOCK / 2;
  template <int I>
  static INLINE Vec<float> vector(const char* block) {
    constexpr int S = I / VECTORS, OF_STEP = I % VECTORS;
    return number(load_bits(block + OF_STEP % HALF * VECTOR_BYTES) >> (4 * S + (OF_STEP < HALF ? 0 : 16)));
  }

 private:
  // 0 .. 15 less 8, of the lowest four bits.
  static INLINE Vec<float> number(BitsVec bits) {
#if defined(__AVX512F__)
    const Vec<float> numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)bits, (__m512)numbers);
#else
    return __builtin_convertvector((IntVec<float>)(bits & 15) - 8, Vec<float>);
#endif
  }
};

#if defined(__AVX512BF16__)

// A block, of which a step is made on demand.
struct Int4Pairs : Pairs {
  __m512i words;

  static INLINE Int4Pairs unpack(const char* block) {
    Int4Pairs w;
    w.words = _mm512_loadu_si512(block);
    return w;
  }
  template <int STEP_OF_BLOCK>
  INLINE void make() {
    // -8 .. 7 as bfloat16, twice: five bits are looked at, of which the highest is another number's.
    const __m512i numbers =
        _mm512_set_epi16(0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
                         short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100),
                         0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
                         short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100));
    at = _mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_maskz_srli_epi16(0xffffffff, words, 4 * STEP_OF_BLOCK),
                                        numbers);
  }
};

#endif

#if defined(__AVX512VNNI__)

// int8 whose scale belongs to a whole row, multiplied as integers: of x the digits to the base 256, -128 .. 127, of its
// numbers in units of a power of two. Three digits, units of 2^-22 of the largest number or less, are nearly always as
// exact as float32. Two, units of 2^-14 of it, are for rows of bfloat16: what they leave away is at most 2^-15 of the
// largest, about what rounding to bfloat16 has cost numbers of a hundredth of it. Sums of integers are exact. The
// digits d begin d * `plane` bytes after x; what belongs to the row follows the digits.
template <int DIGITS_>
struct Int8Digits {
  static constexpr int NUMBERS = 64, BYTES = 1, X_BYTES = 1, DIGITS = DIGITS_;
  // In units: 127 in each digit.
  static constexpr int LARGEST = DIGITS == 3 ? 127 * 65536 + 127 * 256 + 127 : 127 * 256 + 127;
  // The sums of a lane must fit into 32 bits: 255 * 128 * K / 16.
  static constexpr int64_t MOST_K = 1 << 20;
  struct Sums {
    __m512i of[DIGITS];
  };
  struct OfRow {
    Sums begin;  // less what 128 more in each weight adds
    float unit;  // 0 for a row of zeros, NaN where a number is not finite
    float sum;   // of all numbers, in units
  };
  __m512i at;  // plus 128

  static INLINE int64_t plane(int64_t K) { return apart(K); }
  static INLINE int64_t prepared(int64_t K) { return DIGITS * plane(K) + int64_t(sizeof(OfRow)); }
  static INLINE const OfRow& of_row(const char* x, int64_t K) {
    return *reinterpret_cast<const OfRow*>(x + DIGITS * plane(K));  // aligned, as planes are
  }

  static INLINE Int8Digits unpack(const char* row, int64_t k) {
    return {_mm512_xor_si512(_mm512_loadu_si512(row + k), _mm512_set1_epi8(char(0x80)))};
  }
  INLINE void add(Sums& sums, const char* x, int64_t k, int64_t plane) const {
    for (int d = 0; d < DIGITS; d++)
      sums.of[d] = _mm512_dpbusd_epi32(sums.of[d], at, _mm512_loadu_si512(x + d * plane + k));
  }

  static INLINE void prepare(const Rows& x, int64_t row, char* to, int64_t K) {
    const int64_t plane_bytes = plane(K);
    const __m512i all_but_sign = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();  // as bits, which are in the order of the magnitudes, NaN above infinity
    for (int64_t k = 0; k < K; k += 16)
      largest = _mm512_maskz_max_epi32(0xffff, largest, _mm512_and_si512((__m512i)numbers(x, row, k, K), all_but_sign));
    const uint32_t bits = uint32_t(maximum(largest));
    float most;
    __builtin_memcpy(&most, &bits, 4);
    // Of numbers below 2^-104 the last digits are missing.
    int shift = 8 * DIGITS - 2 - (int(bits >> 23) - 127);
    if (shift > 126) shift = 126;
    if (power(shift) * most > LARGEST) shift--;
    const bool finite = bits < 0x7f800000;
    const __m512 scale = _mm512_set1_ps(float(power(finite ? shift : 0)));
    const __m512i half = _mm512_set1_epi32(128);
    for (int64_t k = 0; k < plane_bytes; k += 16) {
      __m512i rest = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(numbers(x, row, k, K), scale));
      for (int d = 0; d < DIGITS; d++) {
        const __m512i above = _mm512_maskz_srai_epi32(0xffff, _mm512_add_epi32(rest, half), 8);
        const __m512i digit = _mm512_sub_epi32(rest, _mm512_maskz_slli_epi32(0xffff, above, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * plane_bytes + k),
                         _mm512_maskz_cvtepi32_epi8(0xffff, digit));
        rest = above;
      }
    }
    Sums of_ones = {};
    for (int64_t k = 0; k < plane_bytes; k += NUMBERS) Int8Digits{_mm512_set1_epi8(1)}.add(of_ones, to, k, plane_bytes);
    OfRow& of_row = *reinterpret_cast<OfRow*>(to + DIGITS * plane_bytes);
    for (int d = 0; d < DIGITS; d++)
      of_row.begin.of[d] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_maskz_slli_epi32(0xffff, of_ones.of[d], 7));
    of_row.unit = finite ? bits ? float(power(-shift)) : 0 : __builtin_nanf("");
    of_row.sum = intarsia::INTARSIA_ISA::sum<float>(lanes(of_ones));
  }

  static INLINE Vec<float> lanes(const Sums& sums) {
    Vec<float> value{};
    for (int d = DIGITS - 1; d >= 0; d--)
      value = value * 256.0f + (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, sums.of[d]);
    return value;
  }

 private:
  static INLINE int32_t maximum(__m512i x) {
    int32_t lanes[16], most = 0;
    _mm512_storeu_si512(lanes, x);
    for (int32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static INLINE double power(int exponent) {  // of two
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
  }
  // Sixteen numbers of x, zeros behind its end.
  static INLINE __m512 numbers(const Rows& x, int64_t row, int64_t k, int64_t K) {
    const int64_t left = K - k;
    const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1 << left) - 1);
    const char* from = x.data + row * x.stride;
    if (x.dtype == Dtype::bfloat16) {
      const __m256i narrow = _mm256_maskz_loadu_epi16(there, from + 2 * k);
      return (__m512)((BitsVec)_mm512_maskz_cvtepu16_epi32(0xffff, narrow) << 16);
    }
    return _mm512_maskz_loadu_ps(there, from + 4 * k);
  }
};

#endif

}  // namespace intarsia::INTARSIA_ISA
