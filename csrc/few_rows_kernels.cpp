// Products with few rows for one instruction set: this file is compiled once for each.
//
//   y[r][n] = Σ_k x[r][k] W[n][k] + bias[n]
//
// One row of x stays in the cache, and rows of weights are read one after the other as they lie in memory. Several rows
// are multiplied piece by piece along k, so that a piece of them stays in the cache for all weights of a task; sums are
// put away in between. Each of the sums is a vector of its own that goes through k in steps, so that it does not depend
// on which others are computed with it.
#include "few_rows_products.h"

namespace intarsia::INTARSIA_ISA {

namespace {

// A task by one of the products.
template <class P>
class Run {
 public:
  INLINE Run(const P& product, const FewRowsForm& form, const FewRowsTask& task)
      : product_(product), form_(form), task_(task), x_bytes_(apart(product.bytes())) {
    for (int n = 0; n < task.last - task.first; n++) {
      scales_[n] = product.scale(task.weights, task.first + n);
      if (task.bias) biases_[n] = task.bias[task.first + n];
    }
    for (int64_t r = 0; r < task.rows; r += TOGETHER) rows(r, task.rows - r < TOGETHER ? int(task.rows - r) : TOGETHER);
  }

 private:
  using Sums = typename P::Sums;
  static constexpr int NR = P::W_ROWS;
  const P& product_;
  const FewRowsForm& form_;
  const FewRowsTask& task_;
  const int64_t x_bytes_;
  float scales_[FEW_ROWS_TASK] = {}, biases_[FEW_ROWS_TASK] = {};

  void rows(int64_t first, int count) {
    Sums sums[FEW_ROWS_TASK][TOGETHER];
    const int64_t length = product_.length(), piece = product_.piece(count);
    const int weights = int(task_.last - task_.first);
    for (int i = 0; i < count; i++) {
      const Sums begin = product_.begin(task_.x + (first + i) * x_bytes_);
      for (int n = 0; n < FEW_ROWS_TASK; n++) sums[n][i] = begin;
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
        weights_rows<NR>(n, first, count, sums, k, end, NR * form_.row_bytes + (n + NR < task_.last ? 0 : back));
      for (; n < task_.last; n++)
        weights_rows<1>(n, first, count, sums, k, end, form_.row_bytes + (n + 1 < task_.last ? 0 : back));
    }
    for (int i = 0; i < count; i++) finish(first + i, &sums[0][i], weights);
  }

  // Writes the task's numbers of row r, whose sums lie TOGETHER apart.
  INLINE void finish(int64_t r, const Sums* sums, int weights) const {
    const char* x = task_.x + r * x_bytes_;
    Vec<float> y[FEW_ROWS_TASK / N];
    for (int v = 0; v < FEW_ROWS_TASK / N; v++) {
      Vec<float> rows[N];
      for (int j = 0; j < N; j++) rows[j] = product_.lanes(sums[(v * N + j) * TOGETHER]);
      y[v] = sums_of<float>(rows);
      if (!form_.zeros) y[v] = y[v] * splat<float>(product_.unit(x)) * load(scales_ + v * N) + load(biases_ + v * N);
    }
    float* numbers = reinterpret_cast<float*>(y);
    for (int n = 0; form_.zeros && n < weights; n++)
      numbers[n] = product_.result(task_.weights, task_.first + n, x, numbers[n]) + biases_[n];
    write_row(task_.y.columns_from(task_.first), task_.places[r], numbers, weights);
  }

  // NR rows of weights with all rows of x.
  template <int NR>
  void weights_rows(int64_t n, int64_t first, int count, Sums (*sums)[TOGETHER], int64_t begin, int64_t end,
                    int64_t ahead) {
    const WeightRows rows{task_.weights.data + n * form_.row_bytes, form_.row_bytes, ahead, 0, NR};
    const XRows<Sums> x{task_.x + first * x_bytes_, x_bytes_, sums[n - task_.first]};
    if constexpr (P::AT_ONCE < TOGETHER)
      if (count > P::AT_ONCE) {
        static_assert(numbers_of_piece(P::AT_ONCE + 1, P::Form::X_BYTES) <= PANEL_NUMBERS);
        Panel<NR> panel;
        panel.read(product_, task_.weights, n, rows, begin, end);
        return of_panel<P::X_ROWS>(panel, {x.data + begin * P::Form::X_BYTES, x_bytes_, x.sums}, count);
      }
    part<P::X_ROWS, NR>(n, rows, x, count, begin, end);
  }
  template <int MR, class PANEL>
  INLINE void of_panel(const PANEL& panel, const XRows<Sums>& x, int count, int i = 0) {
    for (; i + MR <= count; i += MR) panel.template multiply<MR>(x.from(i));
    if constexpr (MR > 1) of_panel<fewer(MR)>(panel, x, count, i);
  }
  // At most MR rows of x at a time. Each time some of the weights' rows are fetched ahead, so that reading memory takes
  // as long as all of the multiplying.
  template <int MR, int NR>
  INLINE void part(int64_t n, WeightRows rows, const XRows<Sums>& x, int count, int64_t begin, int64_t end, int i = 0) {
    for (; i + MR <= count; i += MR) {
      rows.fetched = NR * i / count, rows.fetched_end = NR * (i + MR) / count;
      product_.template part<MR, NR>(task_.weights, n, rows, x.from(i), begin, end);
    }
    if constexpr (MR > 1) part<fewer(MR), NR>(n, rows, x, count, begin, end, i);
  }
};

// Calls `use` with the product that serves a form.
template <class Use>
INLINE auto with_product(const FewRowsForm& form, const Use& use) {
  [[maybe_unused]] const bool narrow = form.x == Dtype::bfloat16;
  switch (form.format) {
    case WeightFormat::float32: return use(Plain<Float32, X_ROWS_OF_WIDE>(form));
    case WeightFormat::bfloat16:
#if defined(__AVX512BF16__)
      if (narrow) return use(Plain<Bfloat16Pairs, X_ROWS>(form));
#endif
      return use(Plain<Bfloat16, X_ROWS_OF_WIDE, AT_ONCE_OF_NARROW>(form));
    case WeightFormat::int8:
      if (form.groups > 1) return use(Scaled<Int8>(form));
#if defined(__AVX512VNNI__)
      if (form.K <= Int8Digits<3>::MOST_K) return narrow ? use(Digits<2>(form)) : use(Digits<3>(form));
#endif
      return use(Plain<Int8, X_ROWS_OF_WIDE, X_ROWS_OF_WIDE>(form));
    case WeightFormat::int4: break;
  }
#if defined(__AVX512BF16__)
  if (narrow) return use(Blocks(form));
#endif
  return use(Scaled<Int4>(form));
}

int64_t prepared(const FewRowsForm& form) {
  return with_product(form, [](const auto& product) { return apart(product.bytes()); });
}
int64_t together(const FewRowsForm& form) {
  // With all of their numbers, they stay in the second cache.
  if (SECOND_CACHE == INT64_MAX) return INT64_MAX;
  const int64_t rows = SECOND_CACHE / prepared(form) / X_ROWS_OF_WIDE * X_ROWS_OF_WIDE;
  if (rows > TOGETHER) return TOGETHER;
  return rows ? rows : X_ROWS_OF_WIDE;
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
    form.format == WeightFormat::int8 ? blocks<Int8>() : blocks<Int4>();
  }

 private:
  const FewRowsForm& form_;
  const char* row_;
  uint16_t* to_;
  const uint16_t *scales_, *zeros_;

  template <class W>
  INLINE void blocks() {
    for (int64_t k = 0; k < form_.K; k += W::BLOCK) steps<W>(row_ + k / W::BLOCK * W::BLOCK_BYTES, k);
  }
  template <class W, int S = 0>
  INLINE void steps(const char* block, int64_t k) {
    if constexpr (S * STEP < W::BLOCK) {
      W step;
      vectors_of<W, S * VECTORS>(block, step.at);
      if (k + S * STEP < form_.K) put(step, k + S * STEP);
      steps<W, S + 1>(block, k);
    }
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

extern const FewRowsKernels few_rows_kernels{prepared, together, prepare, product, unpack};

}  // namespace intarsia::INTARSIA_ISA
