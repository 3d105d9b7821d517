#include "row_program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "few_rows.h"
#include "parallel.h"

namespace intarsia {

namespace {

// Memory that a thread keeps for its next call: fresh one would be paid for in page faults. Several at once, by number.
char* kept(int number, int64_t bytes) {
  static thread_local std::vector<char> memories[2];
  std::vector<char>& memory = memories[number];
  if (memory.size() < size_t(bytes + 64)) memory.resize(size_t(bytes + 64));
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Rows of weights of a task, as many as kernels take, and how many bytes of weights a thread should have at least: on
// fewer, waking it costs more than it brings.
constexpr int64_t TASK_ROWS = FEW_ROWS_TASK, BYTES_OF_THREAD = 65536;

int useful_threads(int64_t bytes, int threads) { return int(std::clamp<int64_t>(bytes / BYTES_OF_THREAD, 1, threads)); }

// The numbers of the rows: where product i goes.
const int64_t* in_order(int64_t rows) {
  static thread_local std::vector<int64_t> numbers;
  if (int64_t(numbers.size()) < rows) {
    numbers.resize(size_t(rows));
    std::iota(numbers.begin(), numbers.end(), 0);
  }
  return numbers.data();
}

// Whether rows that are prepared for one product serve another.
bool alike(const RowProduct& one, const RowProduct& other) {
  const FewRowsForm &a = one.form, &b = other.form;
  return one.from.buffer == other.from.buffer && one.from.column == other.from.column && a.format == b.format &&
         a.x == b.x && a.K == b.K && a.group == b.group && a.zeros == b.zeros;
}

class NormStep : public RowStep {
 public:
  NormStep(RowPlace from, RowPlace to, std::vector<float> weight, double eps, const NormKernels& kernels)
      : from(from), to(to), weight(std::move(weight)), eps(eps), kernels(kernels) {}

  void run(const RowFrame& frame) const override {
    const Rows of_weight{reinterpret_cast<char*>(const_cast<float*>(weight.data())), 0, Dtype::float32};
    const NormSettings settings{of_weight, int(weight.size()), eps, OutputGate::none};
    const NormRun run{frame.at(from), {}, frame.at(to), frame.rows, {}, {}, {}};
    kernels.forward(settings, &run, 1, false, kept(1, kernels.scratch(settings, false)));
  }

 private:
  RowPlace from, to;
  std::vector<float> weight;
  double eps;
  const NormKernels& kernels;
};

class ProductsStep : public RowStep {
 public:
  ProductsStep(std::vector<RowProduct> products, const FewRowsKernels& kernels)
      : products(std::move(products)), kernels(kernels) {
    for (size_t i = 0; i < this->products.size(); i++) {
      const FewRowsForm& form = this->products[i].form;
      size_t first = 0;
      while (!alike(this->products[first], this->products[i])) first++;
      if (first == i)
        offsets.push_back(row_bytes), row_bytes += whole_lines(kernels.prepared(form));
      else
        offsets.push_back(offsets[first]);
      fresh.push_back(first == i);
      first_task.push_back(tasks);
      tasks += (form.N + TASK_ROWS - 1) / TASK_ROWS;
      bytes += form.N * form.row_bytes;
    }
  }

  void run(const RowFrame& frame) const override {
    const int64_t rows = frame.rows, *places = in_order(rows);
    char* prepared = kept(1, rows * row_bytes);
    const auto rows_of = [&](size_t p) { return prepared + rows * offsets[p]; };
    for (size_t p = 0; p < products.size(); p++) {
      const FewRowsForm& form = products[p].form;
      const int64_t each = whole_lines(kernels.prepared(form));
      const Rows x = frame.at(products[p].from);
      for (int64_t i = 0; fresh[p] && i < rows; i++) kernels.prepare(form, x, i, rows_of(p) + i * each);
    }
    parallel_shares(tasks, useful_threads(bytes, frame.threads), 0, [&](int64_t i, char*) {
      const size_t p = size_t(std::upper_bound(first_task.begin(), first_task.end(), i) - first_task.begin()) - 1;
      const RowProduct& product = products[p];
      const int64_t first = (i - first_task[p]) * TASK_ROWS, last = std::min(first + TASK_ROWS, product.form.N);
      kernels.product(product.form,
                      {*product.weights, first, last, rows_of(p), rows, frame.at(product.to), places, product.bias});
    });
  }

 private:
  std::vector<RowProduct> products;
  const FewRowsKernels& kernels;
  std::vector<int64_t> offsets, first_task;  // of each product: its prepared rows, in bytes of one row; its first task
  std::vector<bool> fresh;                   // whether they are prepared for it, and not for one before
  int64_t row_bytes = 0, tasks = 0, bytes = 0;
};

class EachStep : public RowStep {
 public:
  EachStep(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step, const FewRowsForm& form,
           const std::vector<FewRowsWeights>& weights, const FewRowsKernels& kernels)
      : from(from), from_step(from_step), to(to), to_step(to_step), form(form), weights(weights), kernels(kernels) {}

  void run(const RowFrame& frame) const override {
    const int64_t rows = frame.rows, count = int64_t(weights.size()), *places = in_order(rows);
    const int64_t row_bytes = whole_lines(kernels.prepared(form)), each = (form.N + TASK_ROWS - 1) / TASK_ROWS;
    char* prepared = kept(1, count * rows * row_bytes);
    for (int64_t m = 0; m < count; m++) {
      const Rows x = frame.at(from).columns_from(m * from_step);
      for (int64_t i = 0; i < rows; i++) kernels.prepare(form, x, i, prepared + (m * rows + i) * row_bytes);
    }
    const int useful = useful_threads(count * form.N * form.row_bytes, frame.threads);
    parallel_shares(count * each, useful, 0, [&](int64_t i, char*) {
      const int64_t m = i / each, first = i % each * TASK_ROWS;
      kernels.product(
          form, {weights[size_t(m)], first, std::min(first + TASK_ROWS, form.N), prepared + m * rows * row_bytes, rows,
                 frame.at(to).columns_from(m * to_step), places, nullptr});
    });
  }

 private:
  RowPlace from;
  int64_t from_step;
  RowPlace to;
  int64_t to_step;
  FewRowsForm form;
  const std::vector<FewRowsWeights>& weights;
  const FewRowsKernels& kernels;
};

class SwigluStep : public RowStep {
 public:
  SwigluStep(RowPlace gate, RowPlace up, RowPlace to, int64_t width, const RowKernels& kernels)
      : gate(gate), up(up), to(to), width(width), kernels(kernels) {}

  void run(const RowFrame& frame) const override {
    for (int64_t i = 0; i < frame.rows; i++) kernels.swiglu(frame.at(gate), frame.at(up), frame.at(to), i, width);
  }

 private:
  RowPlace gate, up, to;
  int64_t width;
  const RowKernels& kernels;
};

class AddStep : public RowStep {
 public:
  AddStep(RowPlace from, double scale, RowPlace to, int64_t width, const RowKernels& kernels)
      : from(from), scale(scale), to(to), width(width), kernels(kernels) {}

  void run(const RowFrame& frame) const override {
    for (int64_t i = 0; i < frame.rows; i++) kernels.add(frame.at(from), scale, frame.at(to), i, width);
  }

 private:
  RowPlace from;
  double scale;
  RowPlace to;
  int64_t width;
  const RowKernels& kernels;
};

// The experts of a row and how much each counts. Of equal scores the first is chosen.
void choose(const RowRouter& router, const float* logits, std::vector<float>& room, int64_t* chosen, float* weights) {
  const int64_t E = int64_t(router.bias.size()), each = E / router.groups;
  room.resize(size_t(2 * E + router.groups));
  float *scores = room.data(), *biased = scores + E, *strength = biased + E;
  constexpr float NEVER = -std::numeric_limits<float>::infinity();
  if (router.softmax) {
    const float most = *std::max_element(logits, logits + E);
    float total = 0;
    for (int64_t e = 0; e < E; e++) total += scores[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < E; e++) scores[e] /= total;
  } else {
    for (int64_t e = 0; e < E; e++) scores[e] = 1 / (1 + std::exp(-logits[e]));
  }
  for (int64_t e = 0; e < E; e++) biased[e] = scores[e] + router.bias[size_t(e)];
  // By looking for the largest again and again: numbers that are none are never larger, and chosen last.
  const auto take = [](float* from, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
      if (from[i] > from[best] || std::isnan(from[best])) best = i;
    return best;
  };
  if (router.active_groups < router.groups) {
    for (int64_t g = 0; g < router.groups; g++) {
      float first = NEVER, second = NEVER;
      for (int64_t e = g * each; e < (g + 1) * each; e++) {
        if (biased[e] > first)
          second = first, first = biased[e];
        else if (biased[e] > second)
          second = biased[e];
      }
      strength[g] = first + second;
    }
    std::vector<bool> used(size_t(router.groups), false);
    for (int64_t i = 0; i < router.active_groups; i++) {
      const int64_t g = take(strength, router.groups);
      used[size_t(g)] = true, strength[g] = NEVER;
    }
    for (int64_t e = 0; e < E; e++)
      if (!used[size_t(e / each)]) biased[e] = NEVER;
  }
  float total = 1e-20f;
  for (int64_t i = 0; i < router.active; i++) {
    const int64_t e = take(biased, E);
    chosen[i] = e;
    total += weights[i] = router.biased ? biased[e] : scores[e];
    biased[e] = NEVER;
  }
  for (int64_t i = 0; i < router.active; i++) weights[i] *= float(router.factor) / (router.normalize ? total : 1.0f);
}

Array array_of_rows(char* data, int64_t rows, int64_t width, Dtype dtype) {
  return {data, dtype, 2, {rows, width}, {width, 1}};
}

class ExpertsStep : public RowStep {
 public:
  ExpertsStep(RowPlace from, RowPlace logits, RowRouter router, const RowExperts& experts, RowPlace to,
              const Kernels& kernels)
      : from(from), logits(logits), router(std::move(router)), experts(experts), to(to), kernels(kernels) {}

  void run(const RowFrame& frame) const override {
    const Rows x = frame.at(from), scores = frame.at(logits), y = frame.at(to);
    const int64_t active = router.active, pairs = frame.rows * active, D = experts.gate_up.K, F = experts.down.K;
    const int64_t number = size_of(x.dtype),
                  sizes[] = {whole_lines(pairs * D * number), whole_lines(pairs * 2 * F * number),
                             whole_lines(pairs * F * number), whole_lines(pairs * D * 4), whole_lines(D * 4)};
    char* places[5];
    char* memory = kept(1, std::accumulate(std::begin(sizes), std::end(sizes), int64_t(0)));
    for (int i = 0; i < 5; i++) places[i] = memory, memory += sizes[i];
    std::vector<int64_t> chosen(size_t(pairs), 0);
    std::vector<float> weights(size_t(pairs), 0), room;
    for (int64_t r = 0; r < frame.rows; r++) {
      const float* of_row = reinterpret_cast<const float*>(scores.data + r * scores.stride);
      choose(router, of_row, room, chosen.data() + r * active, weights.data() + r * active);
      for (int64_t i = 0; i < active; i++)
        std::memcpy(places[0] + (r * active + i) * D * number, x.data + r * x.stride, size_t(D * number));
    }
    few_rows({experts.gate_up, experts.all_gate_up, array_of_rows(places[0], pairs, D, x.dtype),
              array_of_rows(places[1], pairs, 2 * F, x.dtype), chosen.data(), nullptr},
             kernels.few_rows, frame.threads);
    const Rows hidden{places[1], 2 * F * number, x.dtype}, activated{places[2], F * number, x.dtype};
    for (int64_t p = 0; p < pairs; p++) kernels.row.swiglu(hidden, hidden.columns_from(F), activated, p, F);
    few_rows({experts.down, experts.all_down, array_of_rows(places[2], pairs, F, x.dtype),
              array_of_rows(places[3], pairs, D, Dtype::float32), chosen.data(), nullptr},
             kernels.few_rows, frame.threads);
    const float* given = reinterpret_cast<const float*>(places[3]);
    float* sum = reinterpret_cast<float*>(places[4]);
    for (int64_t r = 0; r < frame.rows; r++) {
      std::fill(sum, sum + D, 0.0f);
      for (int64_t p = r * active; p < (r + 1) * active; p++)
        for (int64_t d = 0; d < D; d++) sum[d] += weights[size_t(p)] * given[p * D + d];
      std::memset(y.data + r * y.stride, 0, size_t(D * size_of(y.dtype)));
      kernels.row.add({places[4], 0, Dtype::float32}, 1, y, r, D);
    }
  }

 private:
  RowPlace from, logits;
  RowRouter router;
  RowExperts experts;
  RowPlace to;
  const Kernels& kernels;
};

class CopyStep : public RowStep {
 public:
  CopyStep(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step, int64_t width, int64_t count)
      : from(from), from_step(from_step), to(to), to_step(to_step), width(width), count(count) {}

  void run(const RowFrame& frame) const override {
    for (int64_t m = 0; m < count; m++) {
      const Rows x = frame.at(from).columns_from(m * from_step), y = frame.at(to).columns_from(m * to_step);
      for (int64_t i = 0; i < frame.rows; i++)
        std::memcpy(y.data + i * y.stride, x.data + i * x.stride, size_t(width * size_of(x.dtype)));
    }
  }

 private:
  RowPlace from;
  int64_t from_step;
  RowPlace to;
  int64_t to_step, width, count;
};

}  // namespace

int RowProgram::add_buffer(int64_t width, bool given, Dtype dtype) {
  if (width < 1) throw std::invalid_argument("rows have numbers");
  if (dtype == Dtype::float64) throw std::invalid_argument("row programs take float32 and bfloat16");
  buffers_.push_back({width, dtype, given});
  given_ += given;
  return int(buffers_.size()) - 1;
}

void RowProgram::check(const RowPlace& place, int64_t width, int64_t step, int64_t count) const {
  if (place.buffer < 0 || place.buffer >= int(buffers_.size()))
    throw std::invalid_argument("there is no such buffer in the program");
  const int64_t last = place.column + (count - 1) * step + width;
  if (place.column < 0 || width < 1 || count < 1 || step < 0 || last > buffers_[size_t(place.buffer)].width)
    throw std::invalid_argument("numbers of a row would lie outside of their buffer");
}

void RowProgram::norm(RowPlace from, RowPlace to, std::vector<float> weight, double eps) {
  const int64_t width = int64_t(weight.size());
  check(from, width), check(to, width);
  steps_.push_back(std::make_unique<NormStep>(from, to, std::move(weight), eps, kernels_.norm));
}

void RowProgram::products(std::vector<RowProduct> products) {
  if (products.empty()) throw std::invalid_argument("there are no products");
  for (RowProduct& product : products) {
    check(product.from, product.form.K), check(product.to, product.form.N);
    product.form.x = buffers_[size_t(product.from.buffer)].dtype;
    for (const RowProduct& other : products)
      if (product.to.buffer == other.from.buffer) throw std::invalid_argument("a product cannot be written over rows");
  }
  steps_.push_back(std::make_unique<ProductsStep>(std::move(products), kernels_.few_rows));
}

void RowProgram::product_of_each(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step,
                                 const FewRowsForm& form, const std::vector<FewRowsWeights>& weights) {
  const int64_t count = int64_t(weights.size());
  check(from, form.K, from_step, count), check(to, form.N, to_step, count);
  if (to.buffer == from.buffer) throw std::invalid_argument("a product cannot be written over its rows");
  FewRowsForm own = form;
  own.x = buffers_[size_t(from.buffer)].dtype;
  steps_.push_back(std::make_unique<EachStep>(from, from_step, to, to_step, own, weights, kernels_.few_rows));
}

void RowProgram::swiglu(RowPlace gate, RowPlace up, RowPlace to, int64_t width) {
  check(gate, width), check(up, width), check(to, width);
  steps_.push_back(std::make_unique<SwigluStep>(gate, up, to, width, kernels_.row));
}

void RowProgram::experts(RowPlace from, RowPlace logits, RowRouter router, const RowExperts& experts, RowPlace to) {
  const int64_t E = int64_t(router.bias.size()), D = experts.gate_up.K, F = experts.down.K;
  check(from, D), check(to, D), check(logits, E);
  if (buffers_[size_t(logits.buffer)].dtype != Dtype::float32) throw std::invalid_argument("logits are float32");
  if (to.buffer == from.buffer) throw std::invalid_argument("experts cannot write over their rows");
  if (int64_t(experts.all_gate_up.size()) != E || int64_t(experts.all_down.size()) != E || experts.gate_up.N != 2 * F ||
      experts.down.N != D)
    throw std::invalid_argument("experts are gate and up [E, 2 F, D] and down [E, D, F]");
  if (router.groups < 1 || E % router.groups || router.active_groups < 1 || router.active_groups > router.groups ||
      router.active < 1 || router.active > E / router.groups * router.active_groups)
    throw std::invalid_argument("there are too few experts for that choice");
  RowExperts own = experts;
  own.gate_up.x = own.down.x = buffers_[size_t(from.buffer)].dtype;
  steps_.push_back(std::make_unique<ExpertsStep>(from, logits, std::move(router), own, to, kernels_));
}

void RowProgram::add(RowPlace from, double scale, RowPlace to, int64_t width) {
  check(from, width), check(to, width);
  steps_.push_back(std::make_unique<AddStep>(from, scale, to, width, kernels_.row));
}

void RowProgram::copy(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step, int64_t width, int64_t count) {
  check(from, width, from_step, count), check(to, width, to_step, count);
  if (buffers_[size_t(from.buffer)].dtype != buffers_[size_t(to.buffer)].dtype)
    throw std::invalid_argument("numbers are copied to where their dtype is");
  steps_.push_back(std::make_unique<CopyStep>(from, from_step, to, to_step, width, count));
}

void RowProgram::run(const std::vector<Rows>& given, int64_t rows, int threads) const {
  if (rows == 0) return;
  RowFrame frame{{}, rows, threads};
  int64_t bytes = 0;
  for (const Buffer& buffer : buffers_)
    if (!buffer.given) bytes += whole_lines(rows * buffer.width * size_of(buffer.dtype));
  char* memory = kept(0, bytes);
  size_t next = 0;
  for (const Buffer& buffer : buffers_) {
    if (buffer.given) {
      frame.buffers.push_back(given[next++]);
      continue;
    }
    const int64_t stride = buffer.width * size_of(buffer.dtype);
    frame.buffers.push_back({memory, stride, buffer.dtype});
    memory += whole_lines(rows * stride);
  }
  for (const auto& step : steps_) step->run(frame);
}

}  // namespace intarsia
