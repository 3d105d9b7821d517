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

// The largest lane of numbers.
template <int STRIDE = N / 2>
INLINE float largest_of(Vec<float> v) {
  if constexpr (STRIDE >= 1) {
    const Vec<float> other = pick<float>(v, v, [](int i) { return (i + STRIDE) % N; });
    return largest_of<STRIDE / 2>(other > v ? other : v);
  } else {
    return v[0];
  }
}

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

// Where the keys and values of a block are that comes next, to fetch them while this one is worked on: of each line of
// memory that is read here, the same one of the key in the same place. Reading heads that lie apart, or pages, the
// processor does not guess what comes next.
struct Ahead {
  const char* const* entries;
  int64_t offset;
  int count;

  INLINE void fetch(int s, int64_t byte) const {
    if (s < count && byte % 64 == 0) __builtin_prefetch(entries[s] + offset + byte, 0, 2);
  }
};

constexpr Ahead NOTHING{nullptr, 0, 0};

// The same one line after the other, as they lie: rows that are long are their own stream for the processor.
class Stream {
 public:
  // Of the `count` rows of `bytes` that begin at entries[s] + offset; `then` others.
  void add(const char* const* entries, int64_t offset, int64_t bytes, int count) {
    parts_[added_++] = {entries, offset, bytes, count};
    lines += (bytes + 63) / 64 * count;
  }
  int64_t lines = 0;

  INLINE void fetch() {
    if (at_ < end_) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
    } else if (row_ < parts_[part_].count) {
      at_ = parts_[part_].entries[row_++] + parts_[part_].offset;
      end_ = at_ + parts_[part_].bytes;
    } else if (part_ + 1 < added_) {
      part_++, row_ = 0;
    }
  }

 private:
  struct Part {
    const char* const* entries;
    int64_t offset, bytes;
    int count;
  };
  Part parts_[2] = {};
  int added_ = 0, part_ = 0, row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

template <class FORM>
class Attention {
 public:
  using Weight = typename Values<FORM>::Weight;
  static constexpr int SIZE = FORM::BYTES;
  // Keys are turned over: to each step along the channels belong the numbers of all keys of a block, so that a query's
  // number meets a vector of keys. Such a step is one number, or a pair of bfloat16.
  static constexpr int STEP_NUMBERS = FORM::PAIRS ? 2 : 1;
  // The rows whose logits are worked on together, which share the keys of a block.
  static constexpr int TOGETHER = 32;
  // Keys that are multiplied together as they lie, and how many such groups fill a vector of logits.
  static constexpr int KEYS_ALONG = 4, GROUPS = N / KEYS_ALONG;

  Attention(const AttendForm& form, Arena& arena)
      : form(form),
        padded_K(round_up(form.K, STEP)),
        padded_V(round_up(form.V, STEP)),
        turned(arena.take<float>(along(form) ? 0 : padded_K / STEP_NUMBERS * BLOCK)),
        partial(arena.take<float>(along(form) ? TOGETHER * GROUPS * N : 0)),
        logits(arena.take<float>(TOGETHER * BLOCK)),
        weights(arena.take<Weight>(TOGETHER * BLOCK)),
        tails_k(arena.take<char>(form.K % STEP ? N * padded_K * SIZE : 0)),
        tails_v(arena.take<char>(form.V % STEP ? BLOCK * padded_V * SIZE : 0)) {}

  void block(const AttendKeys& keys, const AttendKeys* next, const AttendRows& rows) {
    int most = 0;
    for (int i = 0; i < rows.count; i++) {
      const Span span = seen(rows.positions[i], keys);
      most = span.last > most ? span.last : most;
    }
    if (most == 0) return;
    const int coming = next ? next->count : 0;
    const Ahead k_ahead{next ? next->k : nullptr, next ? next->k_offset : 0, coming};
    stream_ = Stream();
    if (along(form) && coming) {
      stream_.add(next->k, next->k_offset, int64_t(form.K) * SIZE, coming);
      // Values that are a part of their keys, as those of latents, are there with them.
      if (next->k[0] + next->k_offset != next->v[0] + next->v_offset)
        stream_.add(next->v, next->v_offset, int64_t(form.V) * SIZE, coming);
    }
    if (!along(form)) turn_over(keys, most, k_ahead);
    const char* v[BLOCK];
    for (int s = 0; s < most; s++) v[s] = whole(keys.v[s] + keys.v_offset, tails_v, s, form.V, padded_V);
    for (int first = 0; first < rows.count; first += TOGETHER) {
      const int count = rows.count - first < TOGETHER ? rows.count - first : TOGETHER;
      const AttendRows some{count,
                            rows.q + first * prepared(form),
                            rows.positions + first,
                            rows.most + first,
                            rows.total + first,
                            rows.sums + int64_t(first) * padded_V};
      Span spans[TOGETHER];
      float factors[TOGETHER];
      for (int i = 0; i < count; i++) spans[i] = seen(some.positions[i], keys);
      if (along(form))
        score_along(keys, most, some);
      else
        score(most, some);
      for (int i = 0; i < count; i++) factors[i] = weigh(some, i, spans[i]);
      const Ahead v_ahead{next ? next->v : nullptr, next ? next->v_offset : 0, first || along(form) ? 0 : coming};
      // Some channels at a time, which stay in the first cache for all rows.
      constexpr int CHANNELS = 256 / SIZE;
      for (int c = 0; c < padded_V; c += CHANNELS)
        weighted_sums(v, some, spans, factors, v_ahead, {c, c + CHANNELS < padded_V ? c + CHANNELS : padded_V});
    }
  }

  static int64_t prepared(const AttendForm& form) { return int64_t(round_up(form.K, STEP)) * (FORM::PAIRS ? 2 : 4); }

  // Long keys, those of latents, are multiplied as they lie: adding up the lanes of a sum costs less than turning so
  // many numbers over, and a block of them would not stay in the first cache.
  static bool along(const AttendForm& form) { return form.K >= 256; }

 private:
  const AttendForm& form;
  int padded_K, padded_V;
  float* turned;    // [steps][BLOCK]
  float* partial;   // [rows][GROUPS][N]
  float* logits;    // [rows][BLOCK]
  Weight* weights;  // the same
  char *tails_k, *tails_v;
  bool long_ = along(form);
  Stream stream_;

  struct Span {  // of a block's keys
    int first, last;
  };
  using Channels = Span;  // of values

  // The keys of a block that a row sees.
  Span seen(int64_t position, const AttendKeys& keys) const {
    int64_t first = form.window ? position - form.window + 1 - keys.first : 0, last = position + 1 - keys.first;
    first = first < 0 ? 0 : first > keys.count ? keys.count : first;
    last = last < first ? first : last > keys.count ? keys.count : last;
    return {int(first), int(last)};
  }

  // A row of keys or values that can be read in whole steps.
  static const char* whole(const char* row, char* tails, int s, int count, int padded) {
    if (count == padded) return row;
    char* copied = tails + int64_t(s) * padded * SIZE;
    copy(copied, row, int64_t(count) * SIZE);
    zero(copied + int64_t(count) * SIZE, int64_t(padded - count) * SIZE);
    return copied;
  }

  // The keys 0 .. count - 1 in `turned`, and whatever it may be up to whole vectors of keys.
  void turn_over(const AttendKeys& keys, int count, const Ahead& ahead) {
    constexpr int NUMBERS = N * 4 / SIZE;  // of a vector's bytes
    for (int s = 0; s < count; s += N) {
      const char* row[N];
      for (int j = 0; j < N; j++)
        row[j] = whole(keys.k[s + j < count ? s + j : count - 1] + keys.k_offset, tails_k, j, form.K, padded_K);
      for (int64_t c = 0; c < padded_K; c += NUMBERS) {
        Vec<float> tile[N];
        for (int j = 0; j < N; j++) {
          tile[j] = load(reinterpret_cast<const float*>(row[j] + c * SIZE));
          if (c < form.K) ahead.fetch(s + j, c * SIZE);
        }
        transpose_lanes<float>(tile);
        float* to = turned + c / STEP_NUMBERS * BLOCK + s;
        for (int i = 0; i < N; i++)
          if constexpr (FORM::PAIRS || SIZE == 4) {
            store(to + i * BLOCK, tile[i]);
          } else {
            const BitsVec pairs = (BitsVec)tile[i];
            store(to + 2 * i * BLOCK, (Vec<float>)(pairs << 16));
            store(to + (2 * i + 1) * BLOCK, (Vec<float>)(pairs & 0xffff0000));
          }
      }
    }
  }

  // logits[i][s] for the keys 0 .. count - 1 and some more, which are not looked at, of keys as they lie: some of them
  // at a time, which stay in the first cache for all rows.
  void score_along(const AttendKeys& keys, int count, const AttendRows& rows) {
    constexpr int MR = N >= 16 ? 4 : 2;
    for (int s = 0; s < count; s += N) {
      for (int g = 0; g < GROUPS; g++) {
        const char* k[KEYS_ALONG];
        for (int n = 0; n < KEYS_ALONG; n++) {
          const int key = s + n * GROUPS + g;
          k[n] = whole(keys.k[key < count ? key : count - 1] + keys.k_offset, tails_k, n, form.K, padded_K);
        }
        int i = 0;
        for (; i + MR <= rows.count; i += MR) along_rows<MR>(k, g, rows, i);
        for (; i < rows.count; i++) along_rows<1>(k, g, rows, i);
      }
      for (int i = 0; i < rows.count; i++) {
        Vec<float> lanes[GROUPS];
        for (int g = 0; g < GROUPS; g++) lanes[g] = load(partial + (i * GROUPS + g) * N);
        store(logits + i * BLOCK + s, sums_of<float, GROUPS / 2>(lanes) * float(form.scale));
      }
    }
  }
  template <int MR>
  void along_rows(const char* const* k, int g, const AttendRows& rows, int i) {
    const int64_t bytes = prepared(form);
    const char* q = rows.q + i * bytes;
    Vec<float> sums[MR][KEYS_ALONG] = {};
    for (int64_t c = 0; c < padded_K; c += STEP) {
      stream_.fetch();
      for (int n = 0; n < KEYS_ALONG; n++) {
        const FORM step = FORM::unpack(k[n], c);
        for (int r = 0; r < MR; r++) step.add(sums[r][n], q + r * bytes, c);
      }
    }
    put_folded<0, MR>(sums, partial + (i * GROUPS + g) * N);
  }
  // By recursion and not in a loop, so that the sums stay in registers.
  template <int R, int MR>
  static INLINE void put_folded(const Vec<float> (&sums)[MR][KEYS_ALONG], float* to) {
    if constexpr (R < MR) {
      store(to, folded(sums[R][0], sums[R][1], sums[R][2], sums[R][3]));
      put_folded<R + 1, MR>(sums, to + GROUPS * N);
    }
  }
  // The sums of four keys in one vector, the lanes of each key's side by side.
  static INLINE Vec<float> folded(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
    exchange<float, N / 2>(a, c);
    exchange<float, N / 2>(b, d);
    a += c, b += d;
    exchange<float, N / 4>(a, b);
    return a + b;
  }

  // The same of keys that are turned over.
  void score(int count, const AttendRows& rows) {
    constexpr int MR = N >= 16 ? 4 : 2;
    int i = 0;
    for (; i + MR <= rows.count; i += MR) score_rows<MR>(count, rows, i);
    for (; i < rows.count; i++) score_rows<1>(count, rows, i);
  }
  template <int MR>
  void score_rows(int count, const AttendRows& rows, int i) {
    constexpr int NR = 4;
    const int64_t bytes = prepared(form);
    const float* q[MR];
    for (int r = 0; r < MR; r++) q[r] = reinterpret_cast<const float*>(rows.q + (i + r) * bytes);
    const int steps = padded_K / STEP_NUMBERS;
    for (int s = 0; s < count; s += NR * N) {
      Vec<float> sums[MR][NR] = {};
      const float* k = turned + s;
      for (int c = 0; c < steps; c++, k += BLOCK)
        for (int r = 0; r < MR; r++) {
          const Vec<float> x = broadcast(q[r] + c);
          for (int j = 0; j < NR; j++) sums[r][j] = add_product(sums[r][j], x, load(k + j * N));
        }
      for (int r = 0; r < MR; r++)
        for (int j = 0; j < NR; j++) store(logits + (i + r) * BLOCK + s + j * N, sums[r][j] * float(form.scale));
    }
  }
  // A number of a query, or a pair of them, in all lanes.
  static INLINE Vec<float> broadcast(const float* q) {
#if defined(__AVX512BF16__)
    if constexpr (FORM::PAIRS) {
      int pair;
      copy(reinterpret_cast<char*>(&pair), reinterpret_cast<const char*>(q), 4);
      return (Vec<float>)_mm512_set1_epi32(pair);
    }
#endif
    return splat<float>(*q);
  }
  static INLINE Vec<float> add_product(Vec<float> sum, Vec<float> q, Vec<float> k) {
#if defined(__AVX512BF16__)
    if constexpr (FORM::PAIRS) return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)k);
#endif
    return sum + q * k;
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
      const Vec<float> masked = ((at >= span.first) & (at < span.last)) ? load(x + s) : splat<float>(-infinity());
      store(x + s, masked);
      largest = masked > largest ? masked : largest;
    }
    const float here = largest_of(largest), most = here > rows.most[i] ? here : rows.most[i];
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
  void weighted_sums(const char* const* v, const AttendRows& rows, const Span* spans, const float* factors,
                     const Ahead& ahead, Channels channels) {
    int i = 0;
    const auto take = [&](auto width) {
      constexpr int MR = decltype(width)::COUNT;
      while (i + MR <= rows.count) {
        if (!share<MR>(v, rows, i, spans, factors, i ? NOTHING : ahead, channels)) {
          for (int r = 0; r < MR; r++)
            weighted_rows<1>(v, rows, i + r, spans[i + r], factors + i + r, i + r ? NOTHING : ahead, channels);
        }
        i += MR;
      }
    };
    if constexpr (N >= 16) take(Width<8>());
    take(Width<N >= 16 ? 4 : 2>());
    take(Width<1>());
  }
  template <int COUNT_>
  struct Width {
    static constexpr int COUNT = COUNT_;
  };

  // Whether MR rows begin with the same keys: what they all see is added to them together, the rest to each alone.
  template <int MR>
  bool share(const char* const* v, const AttendRows& rows, int i, const Span* spans, const float* factors,
             const Ahead& ahead, Channels channels) {
    Span common = spans[i];
    bool alike = true;
    for (int r = 1; r < MR; r++) {
      if (spans[i + r].first != common.first) return false;
      alike = alike && spans[i + r].last == common.last;
      common.last = spans[i + r].last < common.last ? spans[i + r].last : common.last;
    }
    // Keys that are taken together stay together.
    if (!alike) common.last = common.last / Values<FORM>::KEYS * Values<FORM>::KEYS;
    if (common.last <= common.first && !alike) return false;
    weighted_rows<MR>(v, rows, i, common, factors + i, ahead, channels);
    const float one = 1;
    for (int r = 0; r < MR && !alike; r++)
      weighted_rows<1>(v, rows, i + r, {common.last, spans[i + r].last}, &one, NOTHING, channels);
    return true;
  }

  template <int MR>
  void weighted_rows(const char* const* v, const AttendRows& rows, int i, Span span, const float* factors,
                     const Ahead& ahead, Channels channels) {
    if (span.first == span.last) return;
    constexpr int KEYS = Values<FORM>::KEYS;
    const int begin = span.first / KEYS * KEYS;
    for (int64_t c = channels.first; c < channels.last; c += STEP) {
      Vec<float> sums[MR][VECTORS];
      for (int r = 0; r < MR; r++)
        for (int d = 0; d < VECTORS; d++)
          sums[r][d] = load(rows.sums + int64_t(i + r) * padded_V + c + d * N) * factors[r];
      for (int s = begin; s < span.last; s += KEYS) {
        if (long_)
          stream_.fetch();
        else
          for (int j = 0; j < KEYS; j++)
            for (int line = 0; line < STEP * SIZE; line += 64) ahead.fetch(s + j, c * SIZE + line);
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
  const int padded = round_up(form.K, STEP);
  with_form(form, [&](auto numbers) {
    if (decltype(numbers)::PAIRS || Attention<decltype(numbers)>::along(form))
      prepare_row<decltype(numbers)>(q, row, to, form.K, padded);
    else
      read_row(q, row, reinterpret_cast<float*>(to), form.K, padded);
  });
}
void clear(const AttendForm& form, const AttendRows& rows) {
  for (int i = 0; i < rows.count; i++) rows.most[i] = -infinity(), rows.total[i] = 0;
  zero(rows.sums, rows.count * padded(form));
}
void block(const AttendForm& form, const AttendKeys& keys, const AttendKeys* next, const AttendRows& rows,
           char* memory) {
  Arena arena(memory);
  with_form(form, [&](auto numbers) { Attention<decltype(numbers)>(form, arena).block(keys, next, rows); });
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

extern const AttendKernels attend_kernels{prepared, padded, scratch, prepare, clear, block, merge, finish};

}  // namespace intarsia::INTARSIA_ISA
