#include "split.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "parallel.h"

namespace intarsia {

namespace {

// What a task costs beside one that computes all columns with outputs: what does not depend on the columns, and a
// segment's B and M. Measured with K = V = 128.
constexpr double ROWS_ONLY = 0.4, TRANSITION = 1.2;
constexpr int SLICE = 32;            // columns of the narrowest slice
constexpr int64_t SEGMENT = 8;       // chunks of the shortest segment
constexpr double WORTH_WHILE = 0.9;  // of the time without cutting

struct Plan {
  int slices = 1, segments = 1;
};

// How many rounds `threads` need for `count` equal pieces.
double rounds(int64_t count, int threads) { return double((count + threads - 1) / threads); }

Plan plan_of(const std::vector<LinearTask>& tasks, int threads) {
  const int64_t count = int64_t(tasks.size());
  Plan plan;
  if (count >= threads) return plan;
  int64_t tokens = 0;
  for (const LinearTask& task : tasks) tokens = std::max(tokens, task.tokens);
  double best = WORTH_WHILE;
  for (int n = 2; n * SLICE <= tasks[0].V; n++) {
    const double time = rounds(count * n, threads) * (ROWS_ONLY + (1 - ROWS_ONLY) / n);
    if (time < best) best = time, plan = {n, 1};
  }
  for (int n = 2; n * SEGMENT * CHUNK <= tokens && count * (n - 1) < 2 * threads; n++) {
    // The first segment has its outputs at once, the last needs no transition.
    const double time = (rounds(count * (n - 1), threads) * TRANSITION + rounds(count * (n - 1), threads)) / n;
    if (time < best) best = time, plan = {1, n};
  }
  return plan;
}

template <class T>
T* offset(T* numbers, int64_t count, bool wide) {
  if (!numbers) return nullptr;
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(numbers) + count * (wide ? 8 : 4);
}

LinearTask slice_of(LinearTask task, int column, int columns, bool wide) {
  task.v = task.v.columns_from(column);
  task.o = task.o.columns_from(column);
  task.z = task.z.columns_from(column);
  task.V = task.v_columns = columns;
  task.initial = offset(task.initial, column, wide);
  task.final = offset(task.final, column, wide);
  task.chunk_states = offset(task.chunk_states, column, wide);
  return task;
}

LinearTask segment_of(LinearTask task, int64_t first, int64_t last, bool wide) {
  for (Rows* rows : {&task.q, &task.k, &task.v, &task.g, &task.beta, &task.o, &task.z}) *rows = rows->rows_from(first);
  task.tokens = last - first;
  task.chunk_states = offset(task.chunk_states, first / CHUNK * task.chunk_stride, wide);
  return task;
}

void run_all(const std::vector<LinearTask>& tasks, const LinearKernels& kernels, bool wide, bool narrow, int threads) {
  int64_t scratch_bytes = 0;
  for (const LinearTask& task : tasks) scratch_bytes = std::max(scratch_bytes, kernels.forward_scratch(task, wide));
  parallel(int64_t(tasks.size()), threads, scratch_bytes,
           [&](int64_t i, char* scratch) { kernels.forward(tasks[size_t(i)], wide, narrow, scratch); });
}

// The states between the segments of a task.
class Segments {
 public:
  Segments(const LinearTask& task, int64_t count, bool wide)
      : task_(task), wide_(wide), bytes_(wide ? 8 : 4), width_(task.V + task.K) {
    const int64_t chunks = (task.tokens + CHUNK - 1) / CHUNK;
    count = std::max<int64_t>(1, std::min(count, chunks / SEGMENT));
    for (int64_t i = 0; i <= count; i++) edges_.push_back(std::min(chunks * i / count * CHUNK, task.tokens));
    // For every inner edge B and M side by side, [K, V + K], and the state there, [K, V].
    transitions_.resize(size_t((count - 1) * task.K * width_ * bytes_));
    states_.resize(size_t((count - 1) * task.K * task.V * bytes_));
  }

  int64_t count() const { return int64_t(edges_.size()) - 1; }

  // Segment i with its outputs, once the state before it is known.
  LinearTask with_outputs(int64_t i) {
    LinearTask part = segment_of(task_, edges_[size_t(i)], edges_[size_t(i + 1)], wide_);
    if (i > 0) part.initial = state(i);
    // Of the first it is the state that the others follow from. Those are known by then, and read by other threads.
    if (i + 1 < count()) part.final = i == 0 ? state(1) : nullptr;
    return part;
  }

  // Segment i, to find its B and M.
  LinearTask transition(int64_t i) {
    char* S = transition_at(i);
    for (int64_t d = 0; d < task_.K; d++) {
      char* one = S + (d * width_ + task_.V + d) * bytes_;
      wide_ ? void(*reinterpret_cast<double*>(one) = 1) : void(*reinterpret_cast<float*>(one) = 1);
    }
    LinearTask part = segment_of(task_, edges_[size_t(i)], edges_[size_t(i + 1)], wide_);
    part.V = int(width_);
    part.o = part.z = {};
    part.chunk_states = nullptr;
    part.initial = part.final = S;
    part.state_stride = width_;
    return part;
  }

  // All states, from the one behind the first segment.
  void follow(const LinearKernels& kernels) {
    for (int64_t i = 1; i + 1 < count(); i++) {
      const char* B = transition_at(i);
      for (int64_t d = 0; d < task_.K; d++)
        std::memcpy(state(i + 1) + d * task_.V * bytes_, B + d * width_ * bytes_, size_t(task_.V * bytes_));
      kernels.add_product(task_.K, task_.V, task_.K, B + task_.V * bytes_, int(width_), state(i), state(i + 1), wide_);
    }
  }

 private:
  LinearTask task_;
  bool wide_;
  int64_t bytes_, width_;
  std::vector<int64_t> edges_;
  std::vector<char> transitions_, states_;

  char* transition_at(int64_t i) { return transitions_.data() + (i - 1) * task_.K * width_ * bytes_; }
  char* state(int64_t i) { return states_.data() + (i - 1) * task_.K * task_.V * bytes_; }
};

}  // namespace

void run_forward(const std::vector<LinearTask>& tasks, const LinearKernels& kernels, bool wide, bool narrow,
                 int threads) {
  const Plan plan = plan_of(tasks, threads);
  if (plan.segments > 1) {
    std::vector<Segments> all;
    std::vector<LinearTask> before, after;
    for (const LinearTask& task : tasks) all.emplace_back(task, plan.segments, wide);
    for (Segments& segments : all) {
      before.push_back(segments.with_outputs(0));
      for (int64_t i = 1; i + 1 < segments.count(); i++) before.push_back(segments.transition(i));
    }
    run_all(before, kernels, wide, narrow, threads);
    parallel(int64_t(all.size()), threads, 0, [&](int64_t i, char*) { all[size_t(i)].follow(kernels); });
    for (Segments& segments : all)
      for (int64_t i = 1; i < segments.count(); i++) after.push_back(segments.with_outputs(i));
    run_all(after, kernels, wide, narrow, threads);
    return;
  }
  if (plan.slices == 1) return run_all(tasks, kernels, wide, narrow, threads);
  std::vector<LinearTask> slices;
  for (const LinearTask& task : tasks)
    for (int n = 0; n < plan.slices; n++) {
      // In whole vectors, so that no two slices share one.
      const int from = task.V * n / plan.slices / 16 * 16;
      const int to = n + 1 < plan.slices ? task.V * (n + 1) / plan.slices / 16 * 16 : task.V;
      slices.push_back(slice_of(task, from, to - from, wide));
    }
  run_all(slices, kernels, wide, narrow, threads);
}

}  // namespace intarsia
