// Attention to picked tokens for one instruction set: this file is compiled once for each.
#include "gathered_task.h"
#include "rows.h"

namespace intarsia::INTARSIA_ISA {

namespace {

constexpr int N = LANES<float>;
// A tile of products has a sum in each lane.
constexpr int KEYS = N >= 8 ? 4 : 2, HEADS = N / KEYS;
// Vectors of a sum of values that stay in registers, for each of two heads.
constexpr int WIDE = N >= 16 ? 8 : 4;

int padded_numbers(int64_t numbers) { return padded<float>(int(numbers)); }
int padded_rows(int64_t heads) { return round_up(int(heads), HEADS > 2 ? HEADS : 2); }
int64_t places(int64_t count) { return (count + N - 1) / N * N; }
int64_t scratch_numbers(int rows, int64_t count) { return 2 * rows * places(count); }

// found[h][j] = rows[h] · vectors[tokens[j]]; behind the last token stands its number again.
INLINE void products(const float* rows, int count_of_rows, int dim, const float* vectors, const int32_t* tokens,
                     int64_t count, float* found) {
  const int64_t stride = places(count);
  for (int64_t j = 0; j < count; j += KEYS) {
    const float* some[KEYS];
    for (int i = 0; i < KEYS; i++) some[i] = vectors + int64_t(tokens[j + i < count ? j + i : count - 1]) * dim;
    for (int h = 0; h < count_of_rows; h += HEADS) {
      Vec<float> all[N] = {};
      for (int d = 0; d < dim; d += N) {
        Vec<float> k[KEYS];
        for (int i = 0; i < KEYS; i++) k[i] = load(some[i] + d);
        for (int r = 0; r < HEADS; r++) {
          const Vec<float> x = load(rows + int64_t(h + r) * dim + d);
          for (int i = 0; i < KEYS; i++) all[r * KEYS + i] += x * k[i];
        }
      }
      float sums[N];
      store(sums, sums_of<float>(all));
      for (int r = 0; r < HEADS; r++)
        for (int i = 0; i < KEYS; i++) found[(h + r) * stride + j + i] = sums[r * KEYS + i];
    }
  }
  for (int h = 0; h < count_of_rows; h++)
    for (int64_t j = count; j < stride; j++) found[h * stride + j] = found[h * stride + count - 1];
}

// sums[h] = sum of weights[h][j] vectors[tokens[j]].
INLINE void combine(const float* weights, int rows, int dim, const float* vectors, const int32_t* tokens, int64_t count,
                    float* sums) {
  const int64_t stride = places(count);
  for (int h = 0; h < rows; h += 2)
    for (int d = 0; d < dim; d += WIDE * N) {
      const int vecs = dim - d < WIDE * N ? (dim - d) / N : WIDE;
      Vec<float> a[WIDE] = {}, b[WIDE] = {};
      const float *x = weights + h * stride, *y = x + stride;
      if (vecs == WIDE) {
        for (int64_t j = 0; j < count; j++) {
          const float* v = vectors + int64_t(tokens[j]) * dim + d;
          for (int i = 0; i < WIDE; i++) {
            const Vec<float> part = load(v + i * N);
            a[i] += part * x[j], b[i] += part * y[j];
          }
        }
      } else {
        for (int64_t j = 0; j < count; j++) {
          const float* v = vectors + int64_t(tokens[j]) * dim + d;
          for (int i = 0; i < vecs; i++) {
            const Vec<float> part = load(v + i * N);
            a[i] += part * x[j], b[i] += part * y[j];
          }
        }
      }
      for (int i = 0; i < vecs; i++)
        store(sums + h * dim + d + i * N, a[i]), store(sums + (h + 1) * dim + d + i * N, b[i]);
    }
}

// into[tokens[j]] += sum of weights[h][j] rows[h].
INLINE void scatter(const float* weights, int rows, int dim, const float* from, const int32_t* tokens, int64_t count,
                    float* into) {
  const int64_t stride = places(count);
  for (int64_t j = 0; j < count; j++) {
    float* to = into + int64_t(tokens[j]) * dim;
    for (int d = 0; d < dim; d += 2 * N) {
      const bool both = d + N < dim;
      Vec<float> a = load(to + d), b = both ? load(to + d + N) : Vec<float>{};
      for (int h = 0; h < rows; h++) {
        const float x = weights[h * stride + j];
        a += load(from + int64_t(h) * dim + d) * x;
        if (both) b += load(from + int64_t(h) * dim + d + N) * x;
      }
      store(to + d, a);
      if (both) store(to + d + N, b);
    }
  }
}

// What stands behind the last token counts nothing.
INLINE void clear(float* row, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; j++) row[j] = 0;
}

INLINE float largest(const float* row, int64_t numbers, float scale) {
  Vec<float> tops = load(row) * scale;
  for (int64_t j = N; j < numbers; j += N) {
    const Vec<float> x = load(row + j) * scale;
    tops = x > tops ? x : tops;
  }
  float top = tops[0];
  for (int i = 1; i < N; i++) top = tops[i] > top ? tops[i] : top;
  return top;
}

void forward(const GatheredQuery& query, float* o, float* log_sum, float* scratch) {
  const int64_t numbers = places(query.count);
  products(query.q, query.rows, query.K, query.keys, query.tokens, query.count, scratch);
  for (int h = 0; h < query.rows; h++) {
    float* row = scratch + h * numbers;
    const float top = largest(row, numbers, query.scale);
    Vec<float> sums{};
    for (int64_t j = 0; j < numbers; j += N) {
      store(row + j, exp<float>(load(row + j) * query.scale - top));
      if (j + N > query.count) clear(row, query.count, numbers);
      sums += load(row + j);
    }
    const float total = sum<float>(sums);
    log_sum[h] = top + __builtin_logf(total);
    for (int64_t j = 0; j < numbers; j += N) store(row + j, load(row + j) / total);
  }
  combine(scratch, query.rows, query.V, query.values, query.tokens, query.count, o);
}

void backward(const GatheredQuery& query, const float* d_o, const float* log_sum, float* d_q, float* d_keys,
              float* d_values, float* scratch) {
  const int64_t numbers = places(query.count);
  float *weights = scratch, *d_weights = scratch + query.rows * numbers;
  products(query.q, query.rows, query.K, query.keys, query.tokens, query.count, weights);
  products(d_o, query.rows, query.V, query.values, query.tokens, query.count, d_weights);
  for (int h = 0; h < query.rows; h++) {
    float *p = weights + h * numbers, *d = d_weights + h * numbers;
    Vec<float> sums{};
    for (int64_t j = 0; j < numbers; j += N) {
      store(p + j, exp<float>(load(p + j) * query.scale - log_sum[h]));
      if (j + N > query.count) clear(p, query.count, numbers);
      sums += load(p + j) * load(d + j);
    }
    const float along = sum<float>(sums);
    for (int64_t j = 0; j < numbers; j += N) store(d + j, load(p + j) * (load(d + j) - along) * query.scale);
  }
  combine(d_weights, query.rows, query.K, query.keys, query.tokens, query.count, d_q);
  scatter(d_weights, query.rows, query.K, query.q, query.tokens, query.count, d_keys);
  scatter(weights, query.rows, query.V, d_o, query.tokens, query.count, d_values);
}

}  // namespace

extern const GatheredKernels gathered_kernels{padded_numbers, padded_rows, scratch_numbers, forward, backward};

}  // namespace intarsia::INTARSIA_ISA
