#include "few_rows.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"

namespace intarsia {

namespace {

// How many bytes of weights a thread should have at least: on fewer, waking it costs more than it brings.
constexpr int64_t TASK_ROWS = FEW_ROWS_TASK, BYTES_OF_THREAD = 65536;

// Rows of x that are prepared by a thread at a time, as many as to be worth waking it; and bytes of those that are
// prepared before weights are multiplied: what all threads share of the last cache.
constexpr int64_t PREPARED = 32, PREPARED_BYTES = 4 << 20;

Array rows_of(Array array, int64_t first, int64_t count) {
  array.data = array.at(first);
  array.shape[0] = count;
  return array;
}

// Rows of x that are multiplied with one matrix.
struct Segment {
  int64_t matrix, first, count;
};

// The rows in the order of their matrices, and where those begin; at most `together` rows each.
std::vector<Segment> segments_of(const FewRowsCall& call, int64_t together, std::vector<int64_t>& order) {
  const int64_t rows = call.x.shape[0], *matrix = call.matrix_of_row;
  order.resize(size_t(rows));
  std::iota(order.begin(), order.end(), 0);
  if (matrix) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return matrix[a] < matrix[b]; });
  std::vector<Segment> segments;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t of = matrix ? matrix[order[size_t(i)]] : 0;
    if (segments.empty() || segments.back().matrix != of || segments.back().count == together)
      segments.push_back({of, i, 0});
    segments.back().count++;
  }
  return segments;
}

}  // namespace

void few_rows(const FewRowsCall& call, const FewRowsKernels& kernels, int threads) {
  const int64_t rows = call.x.shape[0], row_bytes = kernels.prepared(call.form);
  const int64_t together = kernels.together(call.form), most = std::max(together, PREPARED_BYTES / row_bytes);
  if (rows > most && !call.matrix_of_row) {
    for (int64_t first = 0; first < rows; first += most) {
      FewRowsCall some = call;
      some.x = rows_of(call.x, first, std::min(most, rows - first));
      some.y = rows_of(call.y, first, std::min(most, rows - first));
      few_rows(some, kernels, threads);
    }
    return;
  }
  const Rows x{call.x.data, call.x.stride[0] * size_of(call.x.dtype), call.x.dtype};
  const Rows y{call.y.data, call.y.stride[0] * size_of(call.y.dtype), call.y.dtype};
  std::vector<int64_t> order;
  const std::vector<Segment> segments = segments_of(call, together, order);
  // Kept for the next call: fresh memory would be paid for in page faults.
  static thread_local std::vector<char> memory;
  if (memory.size() < size_t(rows * row_bytes + 63)) memory.resize(size_t(rows * row_bytes + 63));
  char* prepared = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  parallel_shares((rows + PREPARED - 1) / PREPARED, threads, 0, [&](int64_t part, char*) {
    for (int64_t i = part * PREPARED; i < std::min((part + 1) * PREPARED, rows); i++)
      kernels.prepare(call.form, x, order[size_t(i)], prepared + i * row_bytes);
  });

  const int64_t each = (call.form.N + TASK_ROWS - 1) / TASK_ROWS, count = each * int64_t(segments.size());
  const int64_t bytes = call.form.row_bytes * call.form.N * int64_t(segments.size());
  const int useful = int(std::clamp<int64_t>(bytes / BYTES_OF_THREAD, 1, threads));
  parallel_shares(count, useful, 0, [&](int64_t i, char*) {
    const Segment& segment = segments[size_t(i / each)];
    const int64_t first = i % each * TASK_ROWS;
    kernels.product(call.form,
                    {call.weights[size_t(segment.matrix)], first, std::min(first + TASK_ROWS, call.form.N),
                     prepared + segment.first * row_bytes, segment.count, y, order.data() + segment.first, call.bias});
  });
}

void unpack_rows(const FewRowsForm& form, const FewRowsWeights& weights, int64_t first, const Array& to,
                 const FewRowsKernels& kernels, int threads) {
  const int64_t rows = to.shape[0];
  parallel_shares((rows + TASK_ROWS - 1) / TASK_ROWS, threads, 0, [&](int64_t i, char*) {
    for (int64_t n = i * TASK_ROWS; n < std::min((i + 1) * TASK_ROWS, rows); n++)
      kernels.unpack(form, weights, first + n, reinterpret_cast<uint16_t*>(to.data) + n * to.stride[0]);
  });
}

}  // namespace intarsia
