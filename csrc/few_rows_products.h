// Weights of each form, as products with few rows go through them: included once for each instruction set.
//
// A product multiplies `part`s: some numbers of NR rows of weights with those of MR rows of x. Where weights are made
// float32, `read` gives them vector by vector, whoever takes them: the sums at once, or memory, from which many rows of
// x are multiplied. A sum times the `unit` of x and the `scale` of its row of weights is the product, or `result` is
// it, where weights have zeros.
#pragma once

#include "few_rows_task.h"
#include "integers.h"
#include "unpack.h"

namespace intarsia::INTARSIA_ISA {

constexpr int N = LANES<float>;
static_assert(STEP == FEW_ROWS_STEP);

// How many rows of x are gone through together, and how many numbers of theirs: a power of two. A piece of the weights
// stays in the nearest cache for all of these rows. Sums are put away between pieces, which long ones do seldom.
#if INTARSIA_VECTOR_BYTES == 64
constexpr int TOGETHER = 16;
constexpr int64_t SECOND_CACHE = INT64_MAX;
constexpr int64_t numbers_of_piece(int rows, int x_bytes) {
  int64_t numbers = 16384 / x_bytes;
  for (int r = 1; r < rows; r *= 2) numbers /= 2;
  return numbers;
}
#else
constexpr int TOGETHER = 48;
constexpr int64_t SECOND_CACHE = 400000;  // bytes of it that rows of x may have
constexpr int64_t numbers_of_piece(int rows, int) { return rows > 16 ? 512 : 1024; }
#endif
constexpr int64_t PANEL_NUMBERS = 1024;

// How many rows of x are multiplied with one vector of weights: as many as there are registers for the sums.
#if INTARSIA_VECTOR_BYTES == 64
constexpr int X_ROWS = 6, X_ROWS_OF_BLOCK = 4, X_ROWS_OF_WIDE = 4;
#elif INTARSIA_VECTOR_BYTES == 32
constexpr int X_ROWS = 3, X_ROWS_OF_BLOCK = 3, X_ROWS_OF_WIDE = 3;
#else
constexpr int X_ROWS = 2, X_ROWS_OF_BLOCK = 2, X_ROWS_OF_WIDE = 2;
#endif
// Up to how many rows weights in bfloat16 are made float32 again for some at a time, and not once for all.
constexpr int AT_ONCE_OF_NARROW = INTARSIA_VECTOR_BYTES == 64 ? TOGETHER : 16;
constexpr int fewer(int rows) { return rows > 4 ? 4 : rows - 1; }

// Some rows of weights, `row_bytes` apart. Of the rows `fetched` .. `fetched_end`, the numbers `ahead` bytes further on
// are fetched.
struct WeightRows {
  const char* data;
  int64_t row_bytes, ahead;
  int fetched, fetched_end;

  INLINE const char* operator[](int j) const { return data + j * row_bytes; }
  // Where to fetch for row j. What is at hand already costs nothing.
  INLINE const char* next(int j) const { return (*this)[j] + (j >= fetched && j < fetched_end ? ahead : 0); }
};

// Some rows of x and of the sums. Those with row j of the weights begin j * TOGETHER further on.
template <class SUMS>
struct XRows {
  const char* data;
  int64_t row_bytes;
  SUMS* sums;

  INLINE XRows from(int i) const { return {data + i * row_bytes, row_bytes, sums + i}; }
  template <int MR, int NR>
  INLINE void read(SUMS (&to)[NR][MR]) const {
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) to[j][i] = sums[j * TOGETHER + i];
  }
  template <int MR, int NR>
  INLINE void write(const SUMS (&from)[NR][MR]) const {
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) sums[j * TOGETHER + i] = from[j][i];
  }
};

template <int BYTES>
INLINE void fetch(const char* p) {
  for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(p + line, 0, 2);
}

#define ALWAYS_INLINE __attribute__((always_inline))

// Float32 that was made of NR rows of weights, for many rows of x.
template <int NR>
class Panel {
 public:
  template <class P>
  INLINE void read(const P& product, const FewRowsWeights& weights, int64_t n, const WeightRows& rows, int64_t begin,
                   int64_t end) {
    product.template read<NR>(weights, n, rows, begin, end, [&]<int I>(int j, int64_t k, auto w) ALWAYS_INLINE {
      store<float>(numbers_[j] + (k - begin) + I * N, w);
    });
    count_ = (end - begin + STEP - 1) / STEP * STEP;
  }
  // x from where the panel begins.
  template <int MR>
  INLINE void multiply(const XRows<Vec<float>>& x) const {
    Vec<float> sums[NR][MR];
    x.read(sums);
    for (int64_t k = 0; k < count_; k += STEP) vectors<0>(x, k, sums);
    x.write(sums);
  }

 private:
  template <int I, int MR>
  INLINE void vectors(const XRows<Vec<float>>& x, int64_t k, Vec<float> (&sums)[NR][MR]) const {
    if constexpr (I < VECTORS) {
      Vec<float> of_x[MR];
      for (int i = 0; i < MR; i++) of_x[i] = Float32::of_x<I>(x.data + i * x.row_bytes, k);
      for (int j = 0; j < NR; j++) {
        const Vec<float> w = load(numbers_[j] + k + I * N);
        for (int i = 0; i < MR; i++) Float32::multiply(sums[j][i], w, of_x[i]);
      }
      vectors<I + 1>(x, k, sums);
    }
  }

  alignas(64) float numbers_[NR][PANEL_NUMBERS + 16];  // rows apart from each other in the cache
  int64_t count_;
};

// Numbers of x that are laid out as W wants them, and the sums of its groups where weights have zeros.
template <class W>
class Prepared {
 public:
  using Sums = typename W::Sums;
  static constexpr int W_ROWS = 4;
  explicit Prepared(const FewRowsForm& form) : form(form) {}

  int64_t bytes() const { return form.padded() * W::X_BYTES + (form.zeros ? form.groups * 4 : 0); }
  void prepare(const Rows& x, int64_t row, char* to) const {
    prepare_row<W>(x, row, to, form.K, form.padded());
    if (form.zeros)
      for (int64_t g = 0; g < form.groups; g++) group_sums(to)[g] = group_sum(to, g);
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return sums; }
  Sums begin(const char*) const { return Sums{}; }
  float unit(const char*) const { return 1; }
  float scale(const FewRowsWeights&, int64_t) const { return 1; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return total - of_zeros(weights, n, x);
  }

 protected:
  const FewRowsForm& form;

  float* group_sums(char* x) const { return reinterpret_cast<float*>(x + form.padded() * W::X_BYTES); }
  const float* group_sums(const char* x) const { return group_sums(const_cast<char*>(x)); }

  // What zeros take away from a product with row n.
  float of_zeros(const FewRowsWeights& weights, int64_t n, const char* x) const {
    float total = 0;
    const uint16_t *scales = weights.scales + n * form.groups, *zeros = weights.zeros + n * form.groups;
    for (int64_t g = 0; g < form.groups; g++) total += group_sums(x)[g] * (widen(zeros[g]) * widen(scales[g]));
    return total;
  }

 private:
  float group_sum(const char* x, int64_t g) const {
    Vec<float> total{};
    const int64_t end = g + 1 == form.groups ? form.padded() : (g + 1) * form.group;
    for (int64_t k = g * form.group; k < end; k += N)
      if constexpr (W::PAIRS)
        total += widen(*reinterpret_cast<const UnalignedNarrowVec*>(x + 2 * k));
      else
        total += load(reinterpret_cast<const float*>(x) + k);
    return sum<float>(total);
  }
};

// A product P whose weights are read vector by vector.
template <class P, class W>
class Read : public Prepared<W> {
 public:
  using Form = W;
  using Sums = typename W::Sums;
  using Prepared<W>::Prepared;

  // Adds the products of NR rows of weights with MR rows of x to sums that are in registers.
  template <int MR, int NR>
  INLINE void part(const FewRowsWeights& weights, int64_t n, const WeightRows& rows, const XRows<Sums>& x,
                   int64_t begin, int64_t end) const {
    Sums sums[NR][MR];
    x.read(sums);
    static_cast<const P&>(*this).template read<NR>(
        weights, n, rows, begin, end, [&]<int I>(int j, int64_t k, auto w) ALWAYS_INLINE {
          for (int i = 0; i < MR; i++) W::multiply(sums[j][i], w, W::template of_x<I>(x.data + i * x.row_bytes, k));
        });
    x.write(sums);
  }
};

// Weights without scales, or with one of each row. If x has more rows than AT_ONCE, weights are made float32 once for
// all.
template <class W, int MOST, int AT_ONCE_ = TOGETHER>
class Plain : public Read<Plain<W, MOST, AT_ONCE_>, W> {
 public:
  static constexpr int X_ROWS = MOST, AT_ONCE = AT_ONCE_;
  using Read<Plain, W>::Read, Read<Plain, W>::form;

  int64_t length() const { return form.K; }
  int64_t piece(int rows) const { return numbers_of_piece(rows, W::X_BYTES); }

  template <int NR, class Use>
  INLINE void read(const FewRowsWeights&, int64_t, const WeightRows& rows, int64_t begin, int64_t end,
                   const Use& use) const {
    const int64_t whole = end / W::NUMBERS * W::NUMBERS;  // only the last piece does not end with a step
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = rows.next(j);
    for (int64_t k = begin; k < whole; k += W::NUMBERS) {
      for (int j = 0; j < NR; j++) fetch<W::NUMBERS * W::BYTES>(next[j] + k * W::BYTES);
      vectors<0, NR>(rows.data + k * W::BYTES, rows.row_bytes, k, use);
    }
    if (whole == end) return;
    alignas(64) char last[NR][W::NUMBERS * W::BYTES];
    const int64_t there = form.row_bytes - whole * W::BYTES;
    for (int j = 0; j < NR; j++) {
      copy(last[j], rows[j] + whole * W::BYTES, there);
      zero(last[j] + there, W::NUMBERS * W::BYTES - there);
    }
    vectors<0, NR>(last[0], W::NUMBERS * W::BYTES, whole, use);
  }

  float scale(const FewRowsWeights& weights, int64_t n) const { return form.groups ? widen(weights.scales[n]) : 1; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return total * scale(weights, n) - this->of_zeros(weights, n, x);
  }

 private:
  template <int I, int NR, class Use>
  INLINE void vectors(const char* data, int64_t row_bytes, int64_t k, const Use& use) const {
    if constexpr (I < W::COUNT) {
      for (int j = 0; j < NR; j++) use.template operator()<I>(j, k, W::template vector<I>(data + j * row_bytes));
      vectors<I + 1, NR>(data, row_bytes, k, use);
    }
  }
};

// Integers with a scale of each group, made float32: the product of an integer and its scale is exact there.
template <class W>
class Scaled : public Read<Scaled<W>, W> {
 public:
  static constexpr int X_ROWS = X_ROWS_OF_BLOCK, AT_ONCE = X_ROWS;
  using Read<Scaled, W>::Read, Read<Scaled, W>::form;

  int64_t length() const { return form.row_bytes / W::BLOCK_BYTES * W::BLOCK; }
  int64_t piece(int rows) const { return numbers_of_piece(rows, W::X_BYTES); }

  template <int NR, class Use>
  INLINE void read(const FewRowsWeights& weights, int64_t n, const WeightRows& rows, int64_t begin, int64_t end,
                   const Use& use) const {
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = rows.next(j);
    GroupScales<NR> scales(form, weights.scales + n * form.groups, begin);
    for (int64_t k = begin; k < end; k += W::BLOCK) {
      const int64_t at = k / W::BLOCK * W::BLOCK_BYTES;
      for (int j = 0; j < NR; j++) fetch<W::BLOCK_BYTES>(next[j] + at);
      vectors<0, NR>(rows.data + at, rows.row_bytes, k, scales, use);
    }
  }

 private:
  // Of NR rows, the scales of the group at hand.
  template <int NR>
  class GroupScales {
   public:
    INLINE GroupScales(const FewRowsForm& form, const uint16_t* scales, int64_t k) : form_(form), scales_(scales) {
      take(k / form.group);
    }
    // At number k, where a group may begin.
    INLINE void at(int64_t k) {
      if (k == end_) take(g_ + 1);
    }
    INLINE Vec<float> operator[](int j) const { return at_hand_[j]; }

   private:
    const FewRowsForm& form_;
    const uint16_t* scales_;
    int64_t g_, end_;
    Vec<float> at_hand_[NR];

    // int4 may have no such group in its last block.
    INLINE void take(int64_t g) {
      g_ = g, end_ = (g + 1) * form_.group;
      for (int j = 0; j < NR; j++)
        at_hand_[j] = splat<float>(g < form_.groups ? widen(scales_[j * form_.groups + g]) : 0);
    }
  };

  template <int I, int NR, class Use>
  INLINE void vectors(const char* data, int64_t row_bytes, int64_t k, GroupScales<NR>& scales, const Use& use) const {
    if constexpr (I * N < W::BLOCK) {
      if constexpr (I % VECTORS == 0) scales.at(k + I * N);
      for (int j = 0; j < NR; j++)
        use.template operator()<I>(j, k, W::template vector<I>(data + j * row_bytes) * scales[j]);
      vectors<I + 1, NR>(data, row_bytes, k, scales, use);
    }
  }
};

#if defined(__AVX512VNNI__)

template <int DIGITS>
class Digits {
 public:
  using W = Int8Digits<DIGITS>;
  using Sums = typename W::Sums;
  static constexpr int W_ROWS = 4, X_ROWS = 6 / DIGITS, AT_ONCE = TOGETHER;

  explicit Digits(const FewRowsForm& form) : form(form) {}
  int64_t bytes() const { return W::prepared(form.K); }
  void prepare(const Rows& x, int64_t row, char* to) const { W::prepare(x, row, to, form.K); }
  int64_t length() const { return form.row_bytes; }
  int64_t piece(int rows) const { return numbers_of_piece(rows, 2 * W::X_BYTES); }  // of two digits or three

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights&, int64_t, const WeightRows& rows, const XRows<Sums>& x, int64_t begin,
                   int64_t end) const {
    const int64_t whole = end / W::NUMBERS * W::NUMBERS;
    steps<MR, NR>(rows, x, begin, whole);
    if (whole == end) return;
    alignas(64) char last[NR][W::NUMBERS];
    for (int j = 0; j < NR; j++) {
      copy(last[j], rows[j] + whole, end - whole);
      zero(last[j] + (end - whole), W::NUMBERS - (end - whole));
    }
    steps<MR, NR>({last[0], W::NUMBERS, 0, 0, 0}, {x.data + whole, x.row_bytes, x.sums}, 0, W::NUMBERS);
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return W::lanes(sums); }
  INLINE Sums begin(const char* x) const { return W::of_row(x, form.K).begin; }
  float unit(const char* x) const { return W::of_row(x, form.K).unit; }
  float scale(const FewRowsWeights& weights, int64_t n) const { return widen(weights.scales[n]); }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return (total - widen(weights.zeros[n]) * W::of_row(x, form.K).sum) * unit(x) * scale(weights, n);
  }

 private:
  const FewRowsForm& form;

  template <int MR, int NR>
  INLINE void steps(const WeightRows& rows, const XRows<Sums>& x, int64_t begin, int64_t end) const {
    const int64_t plane = W::plane(form.K);
    Sums sums[NR][MR];
    x.read(sums);
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = rows.next(j);
    for (int64_t k = begin; k < end; k += W::NUMBERS)
      for (int j = 0; j < NR; j++) {
        fetch<W::NUMBERS>(next[j] + k);
        const W weights = W::unpack(rows[j], k);
        for (int i = 0; i < MR; i++) weights.add(sums[j][i], x.data + i * x.row_bytes, k, plane);
      }
    x.write(sums);
  }
};

#endif

#if defined(__AVX512BF16__)

// The scales of some groups of a row as float32, zeros behind the last.
class Scales {
 public:
  static constexpr int MOST = 64;
  INLINE void read(const FewRowsForm& form, const FewRowsWeights& weights, int64_t n, int64_t first, int64_t count) {
    const int64_t there = first + count > form.groups ? form.groups - first : count;
    widen_row(weights.scales + n * form.groups + first, int(there), scales_);
    for (int64_t g = there; g < count; g++) scales_[g] = 0;
  }
  INLINE Vec<float> operator[](int64_t g) const { return splat<float>(scales_[g]); }

 private:
  float scales_[MOST];
};

// int4 for rows of bfloat16, in blocks that have some groups, or of which some make a group.
class Blocks : public Prepared<Int4Pairs> {
 public:
  using W = Int4Pairs;
  static constexpr int X_ROWS = X_ROWS_OF_BLOCK, AT_ONCE = TOGETHER;
  using Prepared<W>::Prepared;

  int64_t length() const { return form.padded(); }
  // Whole groups and whole blocks, and no more than scales are kept of.
  int64_t piece(int rows) const {
    const int64_t unit = form.group < INT4_BLOCK ? INT4_BLOCK : form.group;
    const int64_t numbers = numbers_of_piece(rows, W::X_BYTES), scaled = Scales::MOST * form.group;
    const int64_t most = numbers < scaled ? numbers : scaled;
    return most > unit ? most / unit * unit : unit;
  }

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights& weights, int64_t n, const WeightRows& rows, const XRows<Sums>& x,
                   int64_t begin, int64_t end) const {
    switch (form.group) {
      case 32: return blocks<4, MR, NR>(weights, n, rows, x, begin, end);
      case 64: return blocks<2, MR, NR>(weights, n, rows, x, begin, end);
      default: return blocks<1, MR, NR>(weights, n, rows, x, begin, end);
    }
  }

 private:
  template <int GROUPS, int MR, int NR>
  INLINE void blocks(const FewRowsWeights& weights, int64_t n, const WeightRows& rows, const XRows<Sums>& x,
                     int64_t begin, int64_t end) const {
    Scales scales[NR];
    for (int j = 0; j < NR; j++)
      scales[j].read(form, weights, n + j, begin / form.group, (end - begin + form.group - 1) / form.group);
    Sums sums[NR][MR];
    x.read(sums);
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = rows.next(j);
    int64_t g = 0, end_of_group = begin + form.group;
    for (int64_t k = begin; k < end; k += INT4_BLOCK) {
      for (int j = 0; j < NR; j++) {
        fetch<INT4_BLOCK / 2>(next[j] + k / 2);
        W block = W::unpack(rows[j] + k / 2);
        Sums of_group[MR] = {};
        step<GROUPS, 0, MR>(block, x, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 1, MR>(block, x, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 2, MR>(block, x, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 3, MR>(block, x, k, sums[j], of_group, scales[j], g);
      }
      if (GROUPS > 1)
        g += GROUPS;
      else if (k + INT4_BLOCK == end_of_group)
        g++, end_of_group += form.group;
    }
    x.write(sums);
  }
  template <int GROUPS, int S, int MR>
  INLINE void step(W& block, const XRows<Sums>& x, int64_t k, Sums (&sums)[MR], Sums (&of_group)[MR],
                   const Scales& scales, int64_t g) const {
    block.make<S>();
    for (int i = 0; i < MR; i++) block.add(of_group[i], x.data + i * x.row_bytes, k + S * STEP);
    if constexpr ((S + 1) * GROUPS % 4 == 0) {
      const Vec<float> scale = scales[g + S * GROUPS / 4];
      for (int i = 0; i < MR; i++) {
        sums[i] += of_group[i] * scale;
        of_group[i] = Sums{};
      }
    }
  }
};

#endif

}  // namespace intarsia::INTARSIA_ISA
