// Softmax attention to cached keys for one instruction set: this file is compiled once for each.
//
//   o_i = Σ_j e^(logit_ij - most) v_j / Σ_j e^(logit_ij - most)        logit_ij = scale q_iᵀ k_j
//
// Each row of queries is computed as if it were alone: how many are worked on together changes no bit.
#include "attend_task.h"
#include "unpack.h"

namespace intarsia::INTARSIA_ISA {

namespace {

constexpr int N = LANES<float>, BLOCK = ATTEND_BLOCK;

INLINE float infinity() { return __builtin_inff(); }

INLINE float exponential(float x) { return exp_of_negative<float>(splat<float>(x))[0]; }

// Weights in the form in which values are multiplied with them, and the sums of values: a step of channels is `VECTORS`
// vectors, in the order in which FORM unpacks them.
template <class FORM>
struct Values {
  typedef float Weight;
  static constexpr int KEYS = 1;  // that are taken together
  static INLINE Vec<float> rounded_weights(Vec<float> p) { return p; }

  template <int MR>
  static INLINE void add(Vec<float> (&sums)[MR][VECTORS], const char* v, const char*, const float* weights, int stride,
                         int64_t channel) {
    const FORM step = FORM::unpack(v, channel);
    for (int i = 0; i < MR; i++) {
      const Vec<float> p = splat<float>(weights[i * stride]);
      for (int d = 0; d < VECTORS; d++) sums[i][d] += p * step.at[d];
    }
  }
};

#if defined(__AVX512BF16__)

// Two keys at a time, as pairs of bfloat16. In a step of sums stand the channels 0 .. 3 and 8 .. 11 of each 16 first.
template <>
struct Values<Bfloat16Pairs> {
  typedef uint16_t Weight;
  static constexpr int KEYS = 2;
  static INLINE Vec<float> rounded_weights(Vec<float> p) {
    return widen((NarrowVec)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)p));
  }

  template <int MR>
  static INLINE void add(Vec<float> (&sums)[MR][VECTORS], const char* v, const char* next, const uint16_t* weights,
                         int stride, int64_t channel) {
    const __m512i a = _mm512_loadu_si512(v + 2 * channel),
                  b = next ? _mm512_loadu_si512(next + 2 * channel) : _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    for (int i = 0; i < MR; i++) {
      int pair;
      copy(reinterpret_cast<char*>(&pair), reinterpret_cast<const char*>(weights + i * stride), 4);
      const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
      sums[i][0] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[i][0], p, (__m512bh)low);
      sums[i][1] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[i][1], p, (__m512bh)high);
    }
  }
};

#endif

// Where channel c of a step stands in its sums.
template <class FORM>
INLINE int place_of(int c) {
  if constexpr (FORM::PAIRS)
    return c / 8 * 4 % 16 + c % 4 + (c / 4 % 2) * 16;
  else
    return c % FORM::PARTS * (STEP / FORM::PARTS) + c / FORM::PARTS;
}

template <class FORM>
class Attention {
 public:
  using Weight = typename Values<FORM>::Weight;
  static constexpr int SIZE = FORM::BYTES;

  Attention(const AttendForm& form, Arena& arena)
      : form(form),
        padded_K(round_up(form.K, STEP)),
        padded_V(round_up(form.V, STEP)),
        logits(arena.take<float>(ATTEND_ROWS * BLOCK)),
        weights(arena.take<Weight>(ATTEND_ROWS * BLOCK)),
        tails_k(arena.take<char>(form.K % STEP ? BLOCK * padded_K * SIZE : 0)),
        tails_v(arena.take<char>(form.V % STEP ? BLOCK * padded_V * SIZE : 0)) {}

  void chunk(const AttendKeys& keys, const AttendRows& rows) {
    for (int i = 0; i < rows.count; i++) rows.most[i] = -infinity(), rows.total[i] = 0;
    zero(rows.sums, int64_t(rows.count) * padded_V);
    for (int64_t begin = keys.first; begin < keys.last; begin += BLOCK)
      block(keys, begin, int(begin + BLOCK < keys.last ? BLOCK : keys.last - begin), rows);
  }

  static int64_t prepared(const AttendForm& form) { return int64_t(round_up(form.K, STEP)) * (FORM::PAIRS ? 2 : 4); }

 private:
  const AttendForm& form;
  int padded_K, padded_V;
  float* logits;    // [rows][BLOCK]
  Weight* weights;  // the same
  char *tails_k, *tails_v;

  struct Span {  // of a block's keys
    int first, last;
    INLINE bool operator==(const Span& other) const { return first == other.first && last == other.last; }
  };

  // The keys of a block that a row sees.
  Span seen(int64_t position, int64_t begin, int count) const {
    int64_t first = form.window ? position - form.window + 1 - begin : 0, last = position + 1 - begin;
    first = first < 0 ? 0 : first > count ? count : first;
    last = last < first ? first : last > count ? count : last;
    return {int(first), int(last)};
  }

  void block(const AttendKeys& keys, int64_t begin, int count, const AttendRows& rows) {
    Span spans[ATTEND_ROWS];
    int most = 0;
    for (int i = 0; i < rows.count; i++) {
      spans[i] = seen(rows.positions[i], begin, count);
      most = spans[i].last > most ? spans[i].last : most;
    }
    if (most == 0) return;
    const char *k[BLOCK], *v[BLOCK];
    const int64_t offset = begin - keys.first;
    for (int s = 0; s < most; s++) {
      k[s] = whole(keys.k[offset + s], tails_k, s, form.K, padded_K);
      v[s] = whole(keys.v[offset + s], tails_v, s, form.V, padded_V);
    }
    score(k, most, rows);
    float factors[ATTEND_ROWS];
    for (int i = 0; i < rows.count; i++) factors[i] = weigh(rows, i, spans[i]);
    weighted_sums(v, rows, spans, factors);
  }

  // A row of keys or values that can be read in whole steps.
  static const char* whole(const char* row, char* tails, int s, int count, int padded) {
    if (count == padded) return row;
    char* copied = tails + int64_t(s) * padded * SIZE;
    copy(copied, row, int64_t(count) * SIZE);
    zero(copied + int64_t(count) * SIZE, int64_t(padded - count) * SIZE);
    return copied;
  }

  // logits[i][s] for the keys 0 .. count - 1 and some more, which are not looked at.
  void score(const char* const* k, int count, const AttendRows& rows) {
    int i = 0;
    if constexpr (N >= 8)
      for (; i + 4 <= rows.count; i += 4) score_rows<4>(k, count, rows, i);
    for (; i + 2 <= rows.count; i += 2) score_rows<2>(k, count, rows, i);
    for (; i < rows.count; i++) score_rows<1>(k, count, rows, i);
  }
  template <int MR>
  void score_rows(const char* const* k, int count, const AttendRows& rows, int i) {
    constexpr int NR = N / MR;  // as many sums as a vector has lanes
    const int64_t bytes = prepared(form);
    const char* q[MR];
    for (int r = 0; r < MR; r++) q[r] = rows.q + (i + r) * bytes;
    for (int s = 0; s < count; s += NR) {
      const char* row[NR];
      for (int j = 0; j < NR; j++) row[j] = k[s + j < count ? s + j : count - 1];
      Vec<float> sums[N] = {};
      for (int64_t c = 0; c < padded_K; c += STEP)
        for (int j = 0; j < NR; j++) {
          const FORM step = FORM::unpack(row[j], c);
          for (int r = 0; r < MR; r++) step.add(sums[r * NR + j], q[r], c);
        }
      const Vec<float> found = sums_of<float>(sums) * float(form.scale);
      for (int r = 0; r < MR; r++)
        copy(logits + (i + r) * BLOCK + s, reinterpret_cast<const float*>(&found) + r * NR, NR);
    }
  }

  // The weights of a row's keys, zero for those that it does not see; what its sums so far are multiplied with.
  float weigh(const AttendRows& rows, int i, Span span) {
    float* x = logits + i * BLOCK;
    Weight* p = weights + i * BLOCK;
    if (span.first == span.last) return 1;
    const IntVec<float> lane = lane_numbers<float>();
    Vec<float> largest = splat<float>(-infinity());
    for (int s = 0; s < BLOCK; s += N) {
      const IntVec<float> at = lane + s;
      const Vec<float> masked = at >= span.first & at < span.last ? load(x + s) : splat<float>(-infinity());
      store(x + s, masked);
      largest = masked > largest ? masked : largest;
    }
    float most = rows.most[i];
    for (int l = 0; l < N; l++) most = largest[l] > most ? largest[l] : most;
    // What is not a number does not become the largest, and makes the weights none.
    if (most == -infinity() && !not_a_number(x)) {
      zero(reinterpret_cast<char*>(p), BLOCK * int64_t(sizeof(Weight)));
      return 1;
    }
    const float factor = rows.most[i] == -infinity() ? 0 : exponential(rows.most[i] - most);
    Vec<float> total{};
    for (int s = 0; s < BLOCK; s += N) {
      const Vec<float> e = Values<FORM>::rounded_weights(exp_of_negative<float>(load(x + s) - most));
      total += e;
      if constexpr (sizeof(Weight) == 4)
        store(p + s, e);
      else
        *reinterpret_cast<UnalignedNarrowVec*>(p + s) = narrow(e);
    }
    rows.total[i] = rows.total[i] * factor + sum<float>(total);
    rows.most[i] = most;
    return factor;
  }
  static bool not_a_number(const float* x) {
    for (int s = 0; s < BLOCK; s++)
      if (x[s] != x[s]) return true;
    return false;
  }

  // sums[i] = factors[i] sums[i] + Σ_s weights[i][s] v[s]. No key that a row does not see is multiplied, even by zero:
  // it might not be finite.
  void weighted_sums(const char* const* v, const AttendRows& rows, const Span* spans, const float* factors) {
    constexpr int MR = N >= 16 ? 4 : 2;
    for (int i = 0; i < rows.count;) {
      bool alike = i + MR <= rows.count;
      for (int r = 1; alike && r < MR; r++) alike = spans[i + r] == spans[i];
      if (alike)
        weighted_rows<MR>(v, rows, i, spans[i], factors);
      else
        weighted_rows<1>(v, rows, i, spans[i], factors);
      i += alike ? MR : 1;
    }
  }
  template <int MR>
  void weighted_rows(const char* const* v, const AttendRows& rows, int i, Span span, const float* factors) {
    if (span.first == span.last) return;
    constexpr int KEYS = Values<FORM>::KEYS;
    const int begin = span.first / KEYS * KEYS;
    for (int64_t c = 0; c < padded_V; c += STEP) {
      Vec<float> sums[MR][VECTORS];
      for (int r = 0; r < MR; r++)
        for (int d = 0; d < VECTORS; d++)
          sums[r][d] = load(rows.sums + int64_t(i + r) * padded_V + c + d * N) * factors[i + r];
      for (int s = begin; s < span.last; s += KEYS) {
        const Weight* p = weights + i * BLOCK + s;
        if constexpr (KEYS == 1) {
          Values<FORM>::template add<MR>(sums, v[s], nullptr, p, BLOCK, c);
        } else {
          // At the ends of what is seen, one of two keys may not be.
          const bool both = s >= span.first && s + 1 < span.last;
          if (both)
            Values<FORM>::template add<MR>(sums, v[s], v[s + 1], p, BLOCK, c);
          else
            one_of_two<MR>(sums, v, s, span, p, c);
        }
      }
      for (int r = 0; r < MR; r++)
        for (int d = 0; d < VECTORS; d++) store(rows.sums + int64_t(i + r) * padded_V + c + d * N, sums[r][d]);
    }
  }
  template <int MR>
  void one_of_two(Vec<float> (&sums)[MR][VECTORS], const char* const* v, int s, Span span, const Weight* p, int64_t c) {
    const int key = s < span.first ? s + 1 : s;
    Weight alone[MR * 2];
    for (int r = 0; r < MR; r++) alone[2 * r] = p[r * BLOCK + key - s], alone[2 * r + 1] = 0;
    Values<FORM>::template add<MR>(sums, v[key], nullptr, alone, 2, c);
  }
};

// Calls `use` with the form of a call's numbers.
template <class Use>
INLINE auto with_form(const AttendForm& form, const Use& use) {
  return form.dtype == Dtype::bfloat16 ? use(Bfloat16OfNarrow()) : use(Float32());
}

int64_t prepared(const AttendForm& form) {
  return with_form(form, [&](auto numbers) { return Attention<decltype(numbers)>::prepared(form); });
}
int64_t padded(const AttendForm& form) { return round_up(form.V, STEP); }
int64_t scratch(const AttendForm& form) {
  Arena counter;
  with_form(form, [&](auto numbers) { Attention<decltype(numbers)>(form, counter); });
  return counter.used();
}
void prepare(const AttendForm& form, const Rows& q, int64_t row, char* to) {
  with_form(form, [&](auto numbers) { prepare_row<decltype(numbers)>(q, row, to, form.K, round_up(form.K, STEP)); });
}
void chunk(const AttendForm& form, const AttendKeys& keys, const AttendRows& rows, char* memory) {
  Arena arena(memory);
  with_form(form, [&](auto numbers) { Attention<decltype(numbers)>(form, arena).chunk(keys, rows); });
}

void merge(const AttendForm& form, const AttendRows& rows, const AttendRows& more) {
  const int64_t width = padded(form);
  for (int i = 0; i < rows.count; i++) {
    if (more.most[i] == -infinity() && more.total[i] == 0) continue;
    const bool higher = more.most[i] > rows.most[i];
    const float most = higher ? more.most[i] : rows.most[i];
    const float mine = rows.most[i] == -infinity() ? 0 : exponential(rows.most[i] - most);
    const float other = more.most[i] == -infinity() ? 1 : exponential(more.most[i] - most);
    float *to = rows.sums + i * width, *from = more.sums + i * width;
    for (int64_t c = 0; c < width; c += N)
      store<float>(to + c, rounded<float>(load(to + c) * mine) + load(from + c) * other);
    rows.total[i] = rows.total[i] * mine + more.total[i] * other;
    rows.most[i] = most;
  }
}

void finish(const AttendForm& form, const AttendRows& rows, int i, double sink, const Rows& o, int64_t to) {
  const int64_t width = padded(form);
  const float *sums = rows.sums + i * width, given = float(sink);
  float total = rows.total[i], factor = 1;
  if (given != -infinity()) {
    const float most = given > rows.most[i] ? given : rows.most[i];
    factor = rows.most[i] == -infinity() ? 0 : exponential(rows.most[i] - most);
    total = total * factor + exponential(given - most);
  }
  const float inverse = factor / total;
  float step[STEP];
  with_form(form, [&](auto numbers) {
    for (int c = 0; c < form.V; c += STEP) {
      const int count = form.V - c < STEP ? form.V - c : STEP;
      for (int d = 0; d < count; d++) step[d] = sums[c + place_of<decltype(numbers)>(d)] * inverse;
      write_row(o.columns_from(c), to, step, count);
    }
  });
}

}  // namespace

extern const AttendKernels attend_kernels{prepared, padded, scratch, prepare, chunk, merge, finish};

}  // namespace intarsia::INTARSIA_ISA
