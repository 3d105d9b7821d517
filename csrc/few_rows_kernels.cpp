// Products with few rows for one instruction set: this file is compiled once for each.
//
//   y[r][n] = Σ_k x[r][k] W[n][k] + bias[n]
//
// One row of x stays in the cache, and rows of weights are read one after the other as they lie in memory. Several rows
// are multiplied piece by piece along k, so that a piece of them stays in the cache for all weights of a task; sums are
// put away in between. Each of the sums is a vector of its own that goes through k in steps, so that it does not depend
// on which others are computed with it.
#include "few_rows_task.h"
#include "integers.h"
#include "unpack.h"

namespace intarsia::INTARSIA_ISA {

namespace {

constexpr int N = LANES<float>;
static_assert(STEP == FEW_ROWS_STEP);

// How many rows of x are gone through together, and how many bytes of them make a piece.
constexpr int TOGETHER = 16;
constexpr int64_t PIECE_BYTES = 16384;
// How many of their numbers that are, a power of two.
constexpr int64_t numbers_of_piece(int rows, int x_bytes) {
  int64_t numbers = PIECE_BYTES / x_bytes;
  for (int r = 1; r < rows; r *= 2) numbers /= 2;
  return numbers;
}

// How many rows of x are multiplied with one vector of weights: as many as there are registers for the sums.
#if INTARSIA_VECTOR_BYTES == 64
constexpr int X_ROWS = 6, X_ROWS_OF_BLOCK = 4, X_ROWS_OF_GROUP = 2, X_ROWS_OF_WIDE = 4;
#elif INTARSIA_VECTOR_BYTES == 32
constexpr int X_ROWS = 2, X_ROWS_OF_BLOCK = 1, X_ROWS_OF_GROUP = 1, X_ROWS_OF_WIDE = 2;
#else
constexpr int X_ROWS = 1, X_ROWS_OF_BLOCK = 1, X_ROWS_OF_GROUP = 1, X_ROWS_OF_WIDE = 1;
#endif
constexpr int fewer(int rows) { return rows > 4 ? 4 : rows - 1; }

// Some rows of weights and some of x. Of their sums, those with row j of the weights begin j * TOGETHER further on. Of
// the weights' rows `fetched` .. `fetched_end`, the numbers `ahead` bytes further on are fetched.
template <class SUMS>
struct Part {
  const char* w;
  int64_t row_bytes;
  const char* x;
  int64_t x_bytes;
  SUMS* sums;
  int64_t ahead;
  int fetched, fetched_end;

  // Where to fetch for row j. What is at hand already costs nothing.
  INLINE const char* next(int j) const { return w + j * row_bytes + (j >= fetched && j < fetched_end ? ahead : 0); }
};

template <int BYTES>
INLINE void fetch(const char* p) {
  for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// Numbers of x that are laid out as W wants them, and the sums of its groups where weights have zeros.
template <class W>
class Prepared {
 public:
  explicit Prepared(const FewRowsForm& form) : form(form) {}

  int64_t bytes() const { return form.padded() * W::X_BYTES + (form.zeros ? form.groups * 4 : 0); }
  void prepare(const Rows& x, int64_t row, char* to) const {
    prepare_row<W>(x, row, to, form.K, form.padded());
    if (form.zeros)
      for (int64_t g = 0; g < form.groups; g++) group_sums(to)[g] = group_sum(to, g);
  }

 protected:
  const FewRowsForm& form;

  float* group_sums(char* x) const { return reinterpret_cast<float*>(x + form.padded() * W::X_BYTES); }
  const float* group_sums(const char* x) const { return group_sums(const_cast<char*>(x)); }

  // What zeros take away from a product with row n.
  float of_zeros(const FewRowsWeights& weights, int64_t n, const char* x) const {
    if (!form.zeros) return 0;
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

// Weights without scales, or with one of each row.
template <class W, int MOST>
class Plain : public Prepared<W> {
 public:
  using Sums = typename W::Sums;
  static constexpr int W_ROWS = 4, X_ROWS = MOST;
  using Prepared<W>::Prepared, Prepared<W>::form;

  int64_t length() const { return form.K; }
  int64_t piece(int rows) const { return numbers_of_piece(rows, W::X_BYTES); }

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights&, int64_t, const Part<Sums>& p, int64_t begin, int64_t end) const {
    const int64_t whole = end / W::NUMBERS * W::NUMBERS;  // only the last piece does not end with a step
    steps<MR, NR>(p, begin, whole);
    if (whole == end) return;
    alignas(64) char last[NR][W::NUMBERS * W::BYTES];
    const int64_t there = (form.row_bytes - whole * W::BYTES);
    for (int j = 0; j < NR; j++) {
      copy(last[j], p.w + j * p.row_bytes + whole * W::BYTES, there);
      zero(last[j] + there, W::NUMBERS * W::BYTES - there);
    }
    steps<MR, NR>({last[0], W::NUMBERS * W::BYTES, p.x + whole * W::X_BYTES, p.x_bytes, p.sums, 0, 0, 0}, 0,
                  W::NUMBERS);
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return sums; }
  Sums begin(const char*) const { return Sums{}; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return form.groups ? total * widen(weights.scales[n]) - this->of_zeros(weights, n, x) : total;
  }

 private:
  template <int MR, int NR>
  INLINE void steps(const Part<Sums>& p, int64_t begin, int64_t end) const {
    Sums sums[NR][MR];
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) sums[j][i] = p.sums[j * TOGETHER + i];
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = p.next(j);
    for (int64_t k = begin; k < end; k += W::NUMBERS)
      for (int j = 0; j < NR; j++) {
        const char* w = p.w + j * p.row_bytes;
        fetch<W::NUMBERS * W::BYTES>(next[j] + k * W::BYTES);
        const W weights = W::unpack(w, k);
        for (int i = 0; i < MR; i++) weights.add(sums[j][i], p.x + i * p.x_bytes, k);
      }
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) p.sums[j * TOGETHER + i] = sums[j][i];
  }
};

#if defined(__AVX512VNNI__)

template <int DIGITS>
class Digits {
 public:
  using W = Int8Digits<DIGITS>;
  using Sums = typename W::Sums;
  static constexpr int W_ROWS = 4, X_ROWS = 6 / DIGITS;

  explicit Digits(const FewRowsForm& form) : form(form) {}
  int64_t bytes() const { return W::prepared(form.K); }
  void prepare(const Rows& x, int64_t row, char* to) const { W::prepare(x, row, to, form.K); }
  int64_t length() const { return form.row_bytes; }
  int64_t piece(int rows) const { return numbers_of_piece(rows, 2 * W::X_BYTES); }  // of two digits or three

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights&, int64_t, const Part<Sums>& p, int64_t begin, int64_t end) const {
    const int64_t whole = end / W::NUMBERS * W::NUMBERS;
    steps<MR, NR>(p, begin, whole);
    if (whole == end) return;
    alignas(64) char last[NR][W::NUMBERS];
    for (int j = 0; j < NR; j++) {
      copy(last[j], p.w + j * p.row_bytes + whole, end - whole);
      zero(last[j] + (end - whole), W::NUMBERS - (end - whole));
    }
    steps<MR, NR>({last[0], W::NUMBERS, p.x + whole, p.x_bytes, p.sums, 0, 0, 0}, 0, W::NUMBERS);
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return W::lanes(sums); }
  INLINE Sums begin(const char* x) const { return W::of_row(x, form.K).begin; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    const typename W::OfRow& of_row = W::of_row(x, form.K);
    if (form.zeros) total -= widen(weights.zeros[n]) * of_row.sum;
    return total * of_row.unit * widen(weights.scales[n]);
  }

 private:
  const FewRowsForm& form;

  template <int MR, int NR>
  INLINE void steps(const Part<Sums>& p, int64_t begin, int64_t end) const {
    const int64_t plane = W::plane(form.K);
    Sums sums[NR][MR];
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) sums[j][i] = p.sums[j * TOGETHER + i];
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = p.next(j);
    for (int64_t k = begin; k < end; k += W::NUMBERS)
      for (int j = 0; j < NR; j++) {
        const char* w = p.w + j * p.row_bytes;
        fetch<W::NUMBERS>(next[j] + k);
        const W weights = W::unpack(w, k);
        for (int i = 0; i < MR; i++) weights.add(sums[j][i], p.x + i * p.x_bytes, k, plane);
      }
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) p.sums[j * TOGETHER + i] = sums[j][i];
  }
};

#endif

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

// int8 with groups.
class Groups : public Prepared<Int8> {
 public:
  using W = Int8;
  using Sums = W::Sums;
  static constexpr int W_ROWS = 4, X_ROWS = X_ROWS_OF_GROUP;
  using Prepared<Int8>::Prepared;

  int64_t length() const { return form.row_bytes; }
  // Whole groups.
  int64_t piece(int rows) const {
    const int64_t most = numbers_of_piece(rows, W::X_BYTES);
    return form.group < most ? most / form.group * form.group : form.group;
  }

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights& weights, int64_t n, const Part<Sums>& p, int64_t begin, int64_t end) const {
    for (int64_t g = begin / form.group; g * form.group < end; g++) {
      const int64_t last = (g + 1) * form.group < end ? (g + 1) * form.group : end;
      Sums sums[NR][MR] = {};
      for (int64_t k = g * form.group; k < last; k += STEP)
        for (int j = 0; j < NR; j++) {
          const char* w = p.w + j * p.row_bytes;
          fetch<STEP>(p.next(j) + k);
          const W step = W::unpack(w, k);
          for (int i = 0; i < MR; i++) step.add(sums[j][i], p.x + i * p.x_bytes, k);
        }
      for (int j = 0; j < NR; j++)
        for (int i = 0; i < MR; i++)
          p.sums[j * TOGETHER + i] += sums[j][i] * splat<float>(widen(weights.scales[(n + j) * form.groups + g]));
    }
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return sums; }
  Sums begin(const char*) const { return Sums{}; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return total - of_zeros(weights, n, x);
  }
};

// int4, in blocks that have some groups, or of which some make a group.
template <class W>
class Blocks : public Prepared<W> {
 public:
  using Sums = typename W::Sums;
  static constexpr int W_ROWS = 4, X_ROWS = X_ROWS_OF_BLOCK;
  using Prepared<W>::Prepared, Prepared<W>::form;

  int64_t length() const { return form.padded(); }
  // Whole groups and whole blocks, and no more than scales are kept of.
  int64_t piece(int rows) const {
    const int64_t unit = form.group < INT4_BLOCK ? INT4_BLOCK : form.group;
    const int64_t numbers = numbers_of_piece(rows, W::X_BYTES), scaled = Scales::MOST * form.group;
    const int64_t most = numbers < scaled ? numbers : scaled;
    return most > unit ? most / unit * unit : unit;
  }

  template <int MR, int NR>
  INLINE void part(const FewRowsWeights& weights, int64_t n, const Part<Sums>& p, int64_t begin, int64_t end) const {
    switch (form.group) {
      case 32: return blocks<4, MR, NR>(weights, n, p, begin, end);
      case 64: return blocks<2, MR, NR>(weights, n, p, begin, end);
      default: return blocks<1, MR, NR>(weights, n, p, begin, end);
    }
  }

  static INLINE Vec<float> lanes(const Sums& sums) { return sums; }
  Sums begin(const char*) const { return Sums{}; }
  float result(const FewRowsWeights& weights, int64_t n, const char* x, float total) const {
    return total - this->of_zeros(weights, n, x);
  }

 private:
  template <int GROUPS, int MR, int NR>
  INLINE void blocks(const FewRowsWeights& weights, int64_t n, const Part<Sums>& p, int64_t begin, int64_t end) const {
    Scales scales[NR];
    for (int j = 0; j < NR; j++)
      scales[j].read(form, weights, n + j, begin / form.group, (end - begin + form.group - 1) / form.group);
    Sums sums[NR][MR];
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) sums[j][i] = p.sums[j * TOGETHER + i];
    const char* next[NR];
    for (int j = 0; j < NR; j++) next[j] = p.next(j);
    int64_t g = 0, end_of_group = begin + form.group;
    for (int64_t k = begin; k < end; k += INT4_BLOCK) {
      for (int j = 0; j < NR; j++) {
        const char* from = p.w + j * p.row_bytes + k / 2;
        fetch<INT4_BLOCK / 2>(next[j] + k / 2);
        W block = W::unpack(from);
        Sums of_group[MR] = {};
        step<GROUPS, 0, MR>(block, p, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 1, MR>(block, p, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 2, MR>(block, p, k, sums[j], of_group, scales[j], g);
        step<GROUPS, 3, MR>(block, p, k, sums[j], of_group, scales[j], g);
      }
      if (GROUPS > 1)
        g += GROUPS;
      else if (k + INT4_BLOCK == end_of_group)
        g++, end_of_group += form.group;
    }
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) p.sums[j * TOGETHER + i] = sums[j][i];
  }
  template <int GROUPS, int S, int MR>
  INLINE void step(W& block, const Part<Sums>& p, int64_t k, Sums (&sums)[MR], Sums (&of_group)[MR],
                   const Scales& scales, int64_t g) const {
    block.template make<S>();
    for (int i = 0; i < MR; i++) block.add(of_group[i], p.x + i * p.x_bytes, k + S * STEP);
    if constexpr ((S + 1) * GROUPS % 4 == 0) {
      const Vec<float> scale = scales[g + S * GROUPS / 4];
      for (int i = 0; i < MR; i++) {
        sums[i] += of_group[i] * scale;
        of_group[i] = Sums{};
      }
    }
  }
};

// A task by one of the products above.
template <class P>
class Run {
 public:
  INLINE Run(const P& product, const FewRowsForm& form, const FewRowsTask& task)
      : product_(product), form_(form), task_(task), x_bytes_(apart(product.bytes())) {
    for (int64_t r = 0; r < task.rows; r += TOGETHER) rows(r, task.rows - r < TOGETHER ? int(task.rows - r) : TOGETHER);
  }

 private:
  using Sums = typename P::Sums;
  static constexpr int NR = P::W_ROWS;
  const P& product_;
  const FewRowsForm& form_;
  const FewRowsTask& task_;
  const int64_t x_bytes_;

  void rows(int64_t first, int count) {
    Sums sums[FEW_ROWS_TASK][TOGETHER];
    const int64_t length = product_.length(), piece = product_.piece(count);
    const int weights = int(task_.last - task_.first);
    for (int i = 0; i < count; i++) {
      const Sums begin = product_.begin(task_.x + (first + i) * x_bytes_);
      for (int n = 0; n < weights; n++) sums[n][i] = begin;
    }
    // What is fetched ahead is the numbers that come after those at hand: the same of the rows that come next, or the
    // next piece of the first rows. Rows are often as long as pages of memory, and at their ends the processor's own
    // prefetching stops.
    const int64_t piece_bytes = piece < length ? piece * form_.row_bytes / length : 0;
    for (int64_t k = 0; k < length; k += piece) {
      const int64_t end = k + piece < length ? k + piece : length;
      const int64_t back = end < length ? piece_bytes - weights * form_.row_bytes : -(k / piece) * piece_bytes;
      int64_t n = task_.first;
      for (; n + NR <= task_.last; n += NR)
        part<P::X_ROWS, NR>(n, first, count, sums, k, end, NR * form_.row_bytes + (n + NR < task_.last ? 0 : back));
      for (; n < task_.last; n++)
        part<P::X_ROWS, 1>(n, first, count, sums, k, end, form_.row_bytes + (n + 1 < task_.last ? 0 : back));
    }
    for (int i = 0; i < count; i++) {
      const char* x = task_.x + (first + i) * x_bytes_;
      float y[FEW_ROWS_TASK];
      for (int n = 0; n < weights; n += N) {
        Vec<float> rows[N];
        for (int j = 0; j < N; j++) rows[j] = n + j < weights ? product_.lanes(sums[n + j][i]) : Vec<float>{};
        store<float>(y + n, sums_of<float>(rows));
      }
      for (int n = 0; n < weights; n++) {
        const int64_t at = task_.first + n;
        y[n] = product_.result(task_.weights, at, x, y[n]) + (task_.bias ? task_.bias[at] : 0.0f);
      }
      write_row(task_.y.columns_from(task_.first), task_.places[first + i], y, weights);
    }
  }

  // NR rows of weights with all rows of x, at most MR at a time. Each time some of the weights' rows are fetched ahead,
  // so that reading memory takes as long as all of the multiplying.
  template <int MR, int NR>
  INLINE void part(int64_t n, int64_t first, int count, Sums (*sums)[TOGETHER], int64_t begin, int64_t end,
                   int64_t ahead, int i = 0) {
    for (; i + MR <= count; i += MR) {
      Part<Sums> p{task_.weights.data + n * form_.row_bytes,
                   form_.row_bytes,
                   task_.x + (first + i) * x_bytes_,
                   x_bytes_,
                   &sums[n - task_.first][i],
                   ahead,
                   NR * i / count,
                   NR * (i + MR) / count};
      product_.template part<MR, NR>(task_.weights, n, p, begin, end);
    }
    if constexpr (MR > 1) part<fewer(MR), NR>(n, first, count, sums, begin, end, ahead, i);
  }
};

// Calls `use` with the product that serves a form.
template <class Use>
INLINE auto with_product(const FewRowsForm& form, const Use& use) {
  const bool narrow = form.x == Dtype::bfloat16;
  switch (form.format) {
    case WeightFormat::float32: return use(Plain<Float32, X_ROWS_OF_WIDE>(form));
    case WeightFormat::bfloat16:
      return narrow ? use(Plain<Bfloat16OfNarrow, Bfloat16OfNarrow::PAIRS ? X_ROWS : X_ROWS_OF_WIDE>(form))
                    : use(Plain<Bfloat16, X_ROWS_OF_WIDE>(form));
    case WeightFormat::int8:
      if (form.groups > 1) return use(Groups(form));
#if defined(__AVX512VNNI__)
      if (form.K <= Int8Digits<3>::MOST_K) return narrow ? use(Digits<2>(form)) : use(Digits<3>(form));
#endif
      return use(Plain<Int8, X_ROWS_OF_WIDE>(form));
    case WeightFormat::int4: break;
  }
  return narrow ? use(Blocks<Int4OfNarrow>(form)) : use(Blocks<Int4>(form));
}

int64_t prepared(const FewRowsForm& form) {
  return with_product(form, [](const auto& product) { return apart(product.bytes()); });
}
void prepare(const FewRowsForm& form, const Rows& x, int64_t row, char* to) {
  with_product(form, [&](const auto& product) { product.prepare(x, row, to); });
}
void product(const FewRowsForm& form, const FewRowsTask& task) {
  with_product(form, [&](const auto& product) { Run(product, form, task); });
}

// Rows of integers made bfloat16.
class Unpack {
 public:
  INLINE Unpack(const FewRowsForm& form, const FewRowsWeights& weights, int64_t n, uint16_t* to)
      : form_(form), row_(weights.data + n * form.row_bytes), to_(to), scales_(weights.scales + n * form.groups) {
    zeros_ = form.zeros ? weights.zeros + n * form.groups : nullptr;
    if (form.format == WeightFormat::int8)
      for (int64_t k = 0; k < form.K; k += STEP) put(Int8::unpack(row_, k), k);
    else
      for (int64_t k = 0; k < form.K; k += INT4_BLOCK) {
        Int4 block = Int4::unpack(row_ + k / 2);
        put_step<0>(block, k);
        put_step<1>(block, k);
        put_step<2>(block, k);
        put_step<3>(block, k);
      }
  }

 private:
  const FewRowsForm& form_;
  const char* row_;
  uint16_t* to_;
  const uint16_t *scales_, *zeros_;

  template <int S>
  INLINE void put_step(Int4& block, int64_t k) {
    block.make<S>();
    if (k + S * STEP < form_.K) put(block, k + S * STEP);
  }
  template <class W>
  INLINE void put(W step, int64_t k) {
    const int64_t g = k / form_.group;
    const Vec<float> scale = splat<float>(widen(scales_[g]));
    if (zeros_)
      for (int i = 0; i < VECTORS; i++) step.at[i] -= splat<float>(widen(zeros_[g]));
    for (int i = 0; i < VECTORS; i++) step.at[i] *= scale;
    uint16_t last[STEP], *to = k + STEP <= form_.K ? to_ + k : last;
    if constexpr (W::PARTS == 1) {
      for (int i = 0; i < VECTORS; i++) *reinterpret_cast<UnalignedNarrowVec*>(to + i * N) = narrow(step.at[i]);
    } else if constexpr (W::PARTS == 2) {
      for (int i = 0; i < HALF; i++) {
        const BitsVec pair = (rounded_bits(step.at[i]) >> 16) | (rounded_bits(step.at[HALF + i]) & 0xffff0000);
        *reinterpret_cast<UnalignedBits*>(to + 2 * i * N) = pair;
      }
    } else {
      float numbers[STEP];
      for (int i = 0; i < VECTORS; i++) store<float>(numbers + i * N, step.at[i]);
      for (int i = 0; i < STEP; i++) to[i] = narrow(numbers[i % W::PARTS * (STEP / W::PARTS) + i / W::PARTS]);
    }
    if (to == last) copy(to_ + k, last, form_.K - k);
  }
  // Of finite numbers; the upper half of each is the bfloat16.
  static INLINE BitsVec rounded_bits(Vec<float> x) { return (BitsVec)x + 0x7fff + ((BitsVec)x >> 16 & 1); }
};

void unpack(const FewRowsForm& form, const FewRowsWeights& weights, int64_t n, uint16_t* to) {
  Unpack(form, weights, n, to);
}

}  // namespace

extern const FewRowsKernels few_rows_kernels{prepared, prepare, product, unpack};

}  // namespace intarsia::INTARSIA_ISA
