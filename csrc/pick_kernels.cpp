// The choice of blocks for one instruction set: this file is compiled once for each.
#include "borrowed_rows.h"
#include "pick_task.h"

namespace intarsia::INTARSIA_ISA {

namespace {

constexpr int N = LANES<float>;
// A tile of products has a sum in each lane.
constexpr int KEYS = N >= 8 ? 4 : 2, HEADS = N / KEYS;

int padded_numbers(int64_t K) { return padded<float>(int(K)); }
int heads_beside() { return HEADS; }

template <class S>
INLINE Vec<float> part_of(const S* key, int64_t d, int64_t K) {
  return d + N <= K ? load_as<float>(key + d) : load_last<float>(key + d, int(K - d), 0.0f);
}

template <class S>
INLINE void tile(const float* q, int64_t row, const S* const* keys, int64_t K, Vec<float>& sums) {
  Vec<float> all[N] = {};
  for (int64_t d = 0; d < K; d += N) {
    Vec<float> k[KEYS];
    for (int j = 0; j < KEYS; j++) k[j] = part_of(keys[j], d, K);
    for (int h = 0; h < HEADS; h++) {
      const Vec<float> x = load(q + h * row + d);
      for (int j = 0; j < KEYS; j++) all[h * KEYS + j] += x * k[j];
    }
  }
  sums = sums_of<float>(all);
}

template <class S>
INLINE void products_of(const PickQueries& queries, const char* const* keys, int count, int64_t head_bytes,
                        float* products, int64_t stride) {
  const int64_t each = queries.H / queries.heads, rows = round_up(int(each), HEADS);
  for (int64_t head = 0; head < queries.heads; head++)
    for (int first = 0; first < count; first += KEYS) {
      const S* some[KEYS];
      for (int j = 0; j < KEYS; j++)
        some[j] = reinterpret_cast<const S*>(keys[first + j < count ? first + j : count - 1] + head * head_bytes);
      const int there = count - first < KEYS ? count - first : KEYS;
      for (int64_t h = 0; h < each; h += HEADS) {
        Vec<float> sums;
        tile(queries.q + (head * rows + h) * queries.padded, queries.padded, some, queries.K, sums);
        float found[N];
        store(found, sums);
        for (int i = 0; i < HEADS && h + i < each; i++)
          for (int j = 0; j < there; j++) products[(head * each + h + i) * stride + first + j] = found[i * KEYS + j];
      }
    }
}

void products(const PickQueries& queries, const char* const* keys, int count, int64_t head_bytes, Dtype dtype,
              float* products, int64_t stride) {
  if (dtype == Dtype::bfloat16)
    products_of<uint16_t>(queries, keys, count, head_bytes, products, stride);
  else
    products_of<float>(queries, keys, count, head_bytes, products, stride);
}

// `step(vector, place, count)` for the vectors from `begin` to `end` of a row.
template <class Step>
INLINE void over(const float* row, int64_t begin, int64_t end, float fill, const Step& step) {
  int64_t e = begin;
  for (; e + N <= end; e += N) step(load(row + e), e, N);
  if (e < end) step(load_last<float>(row + e, int(end - e), fill), e, int(end - e));
}

INLINE void put(float* to, Vec<float> x, int count) {
  if (count == N) return store(to, x);
  for (int i = 0; i < count; i++) to[i] = x[i];
}

INLINE Vec<float> got(const float* from, int count) {
  return count == N ? load(from) : load_last<float>(from, count, 0.0f);
}

// Adds the shares of one head to the scores.
INLINE void add_shares(const float* row, int64_t begin, int64_t end, bool is_first, float* scores, float* scratch) {
  const float infinity = __builtin_inff();
  Vec<float> tops = splat(-infinity), sums{};
  over(row, begin, end, -infinity, [&](Vec<float> x, int64_t, int) { tops = x > tops ? x : tops; });
  float top = tops[0];
  for (int i = 1; i < N; i++) top = tops[i] > top ? tops[i] : top;
  over(row, begin, end, -infinity, [&](Vec<float> x, int64_t e, int count) {
    const Vec<float> share = exp<float>(x - top);
    sums += share;
    put(scratch + e, share, count);
  });
  // Of infinite products no share is a number.
  const float whole = __builtin_isfinite(top) ? sum<float>(sums) : __builtin_nanf("");
  over(scratch, begin, end, 0.0f, [&](Vec<float> share, int64_t e, int count) {
    const Vec<float> x = share / whole;
    put(scores + e, is_first ? x : got(scores + e, count) + x, count);
  });
}

void scores(const PickForm& form, const float* products, int64_t stride, const float* weights, int count, int64_t begin,
            int64_t end, float* scores, float* scratch) {
  for (int h = 0; h < count; h++) {
    const float* row = products + h * stride;
    if (form.softmax) {
      add_shares(row, begin, end, h == 0, scores, scratch);
      continue;
    }
    const float weight = weights ? weights[h] : 1.0f;
    over(row, begin, end, 0.0f, [&](Vec<float> x, int64_t e, int there) {
      if (form.relu) x = at_least<float>(x, 0.0f);
      if (weights) x = x * weight;
      put(scores + e, h ? got(scores + e, there) + x : x, there);
    });
  }
  const float largest = form.largest;
  over(scores, begin, end, 0.0f, [&](Vec<float> x, int64_t e, int there) {
    x = x != x ? splat(largest) : x;
    put(scores + e, x > splat(largest) ? splat(largest) : x, there);
  });
}

INLINE float largest_of(const float* scores, int64_t begin, int64_t end) {
  float top = -__builtin_inff();
  if (end - begin >= N) {
    Vec<float> tops = splat(top);
    over(scores, begin, end, top, [&](Vec<float> x, int64_t, int) { tops = x > tops ? x : tops; });
    for (int i = 0; i < N; i++) top = tops[i] > top ? tops[i] : top;
    return top;
  }
  for (int64_t e = begin; e < end; e++) top = scores[e] > top ? scores[e] : top;
  return top;
}

// The scores of the keys from `begin` to `end`, of a block whose first stride is `first`.
INLINE float sum_of(const PickForm& form, const float* scores, int64_t begin, int64_t end, int64_t first) {
  bool any = false;
  float total = 0;
  for (int64_t e = begin; e < end; e++) {
    if (scores[e] == -__builtin_inff()) continue;
    const int64_t from = e - form.wide + 1 > first ? e - form.wide + 1 : first;
    const int64_t to = e < first + form.size - 1 ? e : first + form.size - 1;
    total += scores[e] * float(to - from + 1);
    any = true;
  }
  if (!any) return -__builtin_inff();
  if (total != total || total > form.largest) return form.largest;
  return total < -form.largest ? -form.largest : total;
}

void values(const PickForm& form, const float* scores, int64_t begin, int64_t end, int64_t blocks, float* values) {
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = b * form.size, behind = first + form.size + form.wide - 1;
    const int64_t from = first < begin ? begin : first, to = behind < end ? behind : end;
    values[b] = form.summed ? sum_of(form, scores, from, to, first) : largest_of(scores, from, to);
  }
}

int64_t next_above(const float* x, int64_t begin, int64_t end, float threshold) {
  const Vec<float> bound = splat(threshold), one = splat(1.0f), none{};
  int64_t i = begin;
  for (; i + 4 * N <= end; i += 4 * N) {
    Vec<float> above = none;
    for (int j = 0; j < 4; j++) above += load(x + i + j * N) > bound ? one : none;
    if (sum<float>(above) > 0) break;
  }
  while (i < end && !(x[i] > threshold)) i++;
  return i;
}

}  // namespace

extern const PickKernels pick_kernels{padded_numbers, heads_beside, products, scores, values, next_above};

}  // namespace intarsia::INTARSIA_ISA
