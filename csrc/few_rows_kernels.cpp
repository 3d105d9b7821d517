// Products with few rows for one instruction set: this file is compiled once for each.
//
//   y[r][n] = Σ_k x[r][k] W[n][k] + bias[n]
//
// Rows of weights are read once, side by side, from memory; a row of x stays in the cache. Each of the sums is a vector
// of its own that goes through k in steps, so that it does not depend on which others are computed with it.
#include "few_rows_task.h"
#include "unpack.h"

namespace intarsia::INTARSIA_ISA {

namespace {

constexpr int N = LANES<float>;
static_assert(STEP == FEW_ROWS_STEP);

#if defined(__AVX2__)
struct Int8 : Wide<1> {
  static INLINE Int8 unpack(const char* row, int64_t k) {
    Int8 w;
    for (int i = 0; i < VECTORS; i++) {
      const __m128i* p = reinterpret_cast<const __m128i*>(row + k + i * N);
#if defined(__AVX512F__)
      const __m512i numbers = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(p));
#else
      const __m256i numbers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p));
#endif
      w.at[i] = __builtin_convertvector((IntVec<float>)numbers, Vec<float>);
    }
    return w;
  }
};
#else
struct Int8 : Wide<4> {
  static INLINE Int8 unpack(const char* row, int64_t k) {
    constexpr int QUARTER = VECTORS / 4;
    Int8 w;
    for (int i = 0; i < QUARTER; i++) {
      const BitsVec four = load_bits(row + k + i * VECTOR_BYTES);
      for (int b = 0; b < 4; b++)
        w.at[b * QUARTER + i] = __builtin_convertvector((IntVec<float>)(four << (24 - 8 * b)) >> 24, Vec<float>);
    }
    return w;
  }
};
#endif

// A block of int4, of which step i is made on demand.
struct Int4 : Wide<2> {
  BitsVec words[HALF];

  // 0 .. 15 less 8, of the lowest four bits.
  static INLINE Vec<float> number(BitsVec bits) {
#if defined(__AVX512F__)
    const Vec<float> numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)bits, (__m512)numbers);
#else
    return __builtin_convertvector((IntVec<float>)(bits & 15) - 8, Vec<float>);
#endif
  }
  static INLINE Int4 unpack(const char* block) {
    Int4 w;
    for (int i = 0; i < HALF; i++) w.words[i] = load_bits(block + i * VECTOR_BYTES);
    return w;
  }
  template <int STEP_OF_BLOCK>
  INLINE void make() {
    for (int i = 0; i < HALF; i++) {
      at[i] = number(words[i] >> (4 * STEP_OF_BLOCK));
      at[HALF + i] = number(words[i] >> (4 * STEP_OF_BLOCK + 16));
    }
  }
};

#if defined(__AVX512BF16__)

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

using Int4OfNarrow = Int4Pairs;

#else

using Int4OfNarrow = Int4;

#endif

// How many rows of weights and of x are worked on together, without scales and with them: as many as there are
// registers for the sums.
constexpr int WEIGHT_ROWS = 4;
#if INTARSIA_VECTOR_BYTES == 64
constexpr int X_ROWS = 4, X_ROWS_SCALED = 2;
#elif INTARSIA_VECTOR_BYTES == 32
constexpr int X_ROWS = 2, X_ROWS_SCALED = 1;
#else
constexpr int X_ROWS = 1, X_ROWS_SCALED = 1;
#endif

template <class W>
constexpr bool is_int4 = false;
template <>
constexpr bool is_int4<Int4> = true;
#if defined(__AVX512BF16__)
template <>
constexpr bool is_int4<Int4Pairs> = true;
#endif
template <class W>
constexpr bool is_int8 = false;
template <>
constexpr bool is_int8<Int8> = true;

INLINE Vec<float> splat_narrow(uint16_t bits) { return splat<float>(widen(bits)); }

// Integers whose scale belongs to a whole row are multiplied with it in the end.
enum class Scales { none, of_rows, of_groups };

template <class W>
constexpr int bytes_of = 0;
template <>
constexpr int bytes_of<Float32> = 4;
template <>
constexpr int bytes_of<Bfloat16> = 2;
#if defined(__AVX512BF16__)
template <>
constexpr int bytes_of<Bfloat16Pairs> = 2;
#endif

template <class W>
class Product {
 public:
  explicit Product(const FewRowsForm& form) : form(form) {}

  // A prepared row: the numbers in the order and type that W wants, zeros up to whole blocks; and where weights have
  // zeros, the sum of each group as a vector.
  int64_t prepared() const { return numbers_bytes() + (form.zeros ? form.groups * VECTOR_BYTES : 0); }

  void prepare(const Rows& x, int64_t row, char* to) const {
    prepare_row<W>(x, row, to, form.K, form.padded());
    if (form.zeros)
      for (int64_t g = 0; g < form.groups; g++) store(group_sums(to) + g * N, group_sum(to, g));
  }

  void run(const FewRowsTask& task) const {
    if constexpr (is_int4<W>)
      rows<X_ROWS_SCALED, Scales::of_groups>(task);
    else if constexpr (is_int8<W>)
      form.groups == 1 ? rows<X_ROWS, Scales::of_rows>(task) : rows<X_ROWS_SCALED, Scales::of_groups>(task);
    else
      rows<X_ROWS, Scales::none>(task);
  }

 private:
  const FewRowsForm& form;

  static constexpr int64_t X_BYTES = W::PAIRS ? 2 : 4;  // of a number of x
  int64_t numbers_bytes() const { return form.padded() * X_BYTES; }
  float* group_sums(char* x) const { return reinterpret_cast<float*>(x + numbers_bytes()); }
  const float* group_sums(const char* x) const { return reinterpret_cast<const float*>(x + numbers_bytes()); }

  Vec<float> group_sum(const char* x, int64_t g) const {
    Vec<float> total{};
    const int64_t end = g + 1 == form.groups ? form.padded() : (g + 1) * form.group;
    for (int64_t k = g * form.group; k < end; k += N)
      if constexpr (W::PAIRS)
        total += widen(*reinterpret_cast<const UnalignedNarrowVec*>(x + 2 * k));
      else
        total += load(reinterpret_cast<const float*>(x) + k);
    return total;
  }

  template <int MR, Scales SCALES>
  void rows(const FewRowsTask& task) const {
    int64_t n = task.first;
    for (; n + WEIGHT_ROWS <= task.last; n += WEIGHT_ROWS) rows_of_x<MR, WEIGHT_ROWS, SCALES>(task, n);
    for (; n < task.last; n++) rows_of_x<MR, 1, SCALES>(task, n);
  }
  template <int MR, int NR, Scales SCALES>
  INLINE void rows_of_x(const FewRowsTask& task, int64_t n) const {
    int64_t r = 0;
    for (; r + MR <= task.rows; r += MR) tile<MR, NR, SCALES>(task, r, n);
    if constexpr (MR > 2)
      for (; r + 2 <= task.rows; r += 2) tile<2, NR, SCALES>(task, r, n);
    if constexpr (MR > 1)
      for (; r < task.rows; r++) tile<1, NR, SCALES>(task, r, n);
  }

  static constexpr int BYTES_OF_STEP = is_int8<W> ? STEP : STEP * bytes_of<W>;

  // The same place of the rows that come next. Rows are often as long as pages of memory, and at their ends the
  // processor's own prefetching stops.
  template <int NR, int BYTES>
  INLINE void fetch_ahead(const char* p) const {
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(p + NR * form.row_bytes + line);
  }

  template <int MR, int NR>
  struct Tile {
    const char *x[MR], *w[NR];
    Vec<float> sums[MR][NR];
  };

  template <int MR, int NR, Scales SCALES>
  void tile(const FewRowsTask& task, int64_t r, int64_t n) const {
    const int64_t x_bytes = (prepared() + 63) / 64 * 64;
    Tile<MR, NR> t;
    for (int i = 0; i < MR; i++) t.x[i] = task.x + (r + i) * x_bytes;
    for (int j = 0; j < NR; j++) t.w[j] = task.weights.data + (n + j) * form.row_bytes;
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j++) t.sums[i][j] = Vec<float>{};
    if constexpr (is_int4<W>) {
      switch (form.group) {
        case 32: blocks<4>(task.weights, n, t); break;
        case 64: blocks<2>(task.weights, n, t); break;
        default: blocks<1>(task.weights, n, t);
      }
    } else if constexpr (SCALES == Scales::none) {
      given(t);
    } else if constexpr (SCALES == Scales::of_rows) {
      steps(t, t.sums, 0, form.row_bytes);
      scale_rows(task.weights, n, t);
    } else {
      groups(task.weights, n, t);
    }
    for (int i = 0; i < MR; i++) {
      float y[NR];
      for (int j = 0; j < NR; j++) y[j] = sum<float>(t.sums[i][j]) + (task.bias ? task.bias[n + j] : 0.0f);
      write_row(task.y.columns_from(n), task.places[r + i], y, NR);
    }
  }

  template <int MR, int NR>
  INLINE void steps(const Tile<MR, NR>& t, Vec<float> (&sums)[MR][NR], int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; k += STEP)
      for (int j = 0; j < NR; j++) {
        fetch_ahead<NR, BYTES_OF_STEP>(t.w[j] + k * BYTES_OF_STEP / STEP);
        const W weights = W::unpack(t.w[j], k);
        for (int i = 0; i < MR; i++) weights.add(sums[i][j], t.x[i], k);
      }
  }

  // Weights that lie as they were given: what is behind the last whole step is copied to have zeros behind it.
  template <int MR, int NR>
  INLINE void given(Tile<MR, NR>& t) const {
    const int64_t whole = form.K / STEP * STEP, rest = form.K - whole;
    steps(t, t.sums, 0, whole);
    if (rest == 0) return;
    alignas(64) char last[NR][STEP * 4];
    for (int i = 0; i < MR; i++) t.x[i] += whole * X_BYTES;
    for (int j = 0; j < NR; j++) {
      copy(last[j], t.w[j] + whole * W::BYTES, rest * W::BYTES);
      zero(last[j] + rest * W::BYTES, (STEP - rest) * W::BYTES);
      t.w[j] = last[j];
    }
    steps(t, t.sums, 0, STEP);
  }

  template <int MR, int NR>
  INLINE void scale_rows(const FewRowsWeights& weights, int64_t n, Tile<MR, NR>& t) const {
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) {
        if (form.zeros) t.sums[i][j] -= load(group_sums(t.x[i])) * widen(weights.zeros[n + j]);
        t.sums[i][j] *= widen(weights.scales[n + j]);
      }
  }

  template <int MR, int NR>
  INLINE void groups(const FewRowsWeights& weights, int64_t n, Tile<MR, NR>& t) const {
    for (int64_t g = 0; g < form.groups; g++) {
      const int64_t begin = g * form.group, end = begin + form.group;
      Vec<float> part[MR][NR] = {};
      steps(t, part, begin, end < form.row_bytes ? end : form.row_bytes);
      for (int j = 0; j < NR; j++) {
        const int64_t at = (n + j) * form.groups + g;
        for (int i = 0; i < MR; i++) {
          if (form.zeros) part[i][j] -= load(group_sums(t.x[i]) + g * N) * splat_narrow(weights.zeros[at]);
          t.sums[i][j] += part[i][j] * splat_narrow(weights.scales[at]);
        }
      }
    }
  }

  // Blocks of int4 that have `GROUPS` groups, or of which some make a group.
  template <int GROUPS, int MR, int NR>
  INLINE void blocks(const FewRowsWeights& weights, int64_t n, Tile<MR, NR>& t) const {
    const int64_t count = form.padded() / INT4_BLOCK, of_group = GROUPS > 1 ? 1 : form.group / INT4_BLOCK;
    for (int64_t b = 0, g = 0, done = 0; b < count; b++) {
      for (int j = 0; j < NR; j++) {
        fetch_ahead<NR, INT4_BLOCK / 2>(t.w[j] + b * (INT4_BLOCK / 2));
        W block = W::unpack(t.w[j] + b * (INT4_BLOCK / 2));
        const uint16_t* scales = weights.scales + (n + j) * form.groups + g;
        Vec<float> part[MR] = {};
        steps_of_block<GROUPS, 0>(block, t, b, part, j, scales, g);
        steps_of_block<GROUPS, 1>(block, t, b, part, j, scales, g);
        steps_of_block<GROUPS, 2>(block, t, b, part, j, scales, g);
        steps_of_block<GROUPS, 3>(block, t, b, part, j, scales, g);
      }
      // What is missing of the last block has no scales; those of the group before are finite and do.
      if (GROUPS > 1)
        g += GROUPS;
      else if (++done == of_group)
        g++, done = 0;
    }
    if (form.zeros) subtract_zeros(weights, n, t);
  }
  template <int GROUPS, int S, int MR, int NR>
  INLINE void steps_of_block(W& block, Tile<MR, NR>& t, int64_t b, Vec<float> (&part)[MR], int j,
                             const uint16_t* scales, int64_t g) const {
    constexpr int GROUP = S * GROUPS / 4;
    block.template make<S>();
    for (int i = 0; i < MR; i++) block.add(part[i], t.x[i], b * INT4_BLOCK + S * STEP);
    if constexpr ((S + 1) * GROUPS % 4 == 0) {
      if (GROUPS > 1 && g + GROUP >= form.groups) return;
      const Vec<float> scale = splat_narrow(scales[GROUP]);
      for (int i = 0; i < MR; i++) {
        t.sums[i][j] += part[i] * scale;
        part[i] = Vec<float>{};
      }
    }
  }
  template <int MR, int NR>
  INLINE void subtract_zeros(const FewRowsWeights& weights, int64_t n, Tile<MR, NR>& t) const {
    for (int64_t g = 0; g < form.groups; g++)
      for (int j = 0; j < NR; j++) {
        const int64_t at = (n + j) * form.groups + g;
        const Vec<float> zero = splat_narrow(weights.zeros[at]) * widen(weights.scales[at]);
        for (int i = 0; i < MR; i++) t.sums[i][j] -= load(group_sums(t.x[i]) + g * N) * zero;
      }
  }
};

// Calls `use` with the product that serves a form.
template <class Use>
INLINE auto with_product(const FewRowsForm& form, const Use& use) {
  const bool narrow = form.x == Dtype::bfloat16;
  switch (form.format) {
    case WeightFormat::float32: return use(Product<Float32>(form));
    case WeightFormat::bfloat16: return narrow ? use(Product<Bfloat16OfNarrow>(form)) : use(Product<Bfloat16>(form));
    case WeightFormat::int8: return use(Product<Int8>(form));
    case WeightFormat::int4: break;
  }
  return narrow ? use(Product<Int4OfNarrow>(form)) : use(Product<Int4>(form));
}

int64_t prepared(const FewRowsForm& form) {
  return with_product(form, [](const auto& product) { return product.prepared(); });
}
void prepare(const FewRowsForm& form, const Rows& x, int64_t row, char* to) {
  with_product(form, [&](const auto& product) { product.prepare(x, row, to); });
}
void product(const FewRowsForm& form, const FewRowsTask& task) {
  with_product(form, [&](const auto& product) { product.run(task); });
}

}  // namespace

extern const FewRowsKernels few_rows_kernels{prepared, prepare, product};

}  // namespace intarsia::INTARSIA_ISA
