// Programs of what is done to each row of numbers alone: norms, products with packed weights, activations, sums. One
// call computes all of it for a few rows, such as the tokens of a decoding step between two of a model's exchanges.
#pragma once

#include <memory>
#include <vector>

#include "dispatch.h"

namespace intarsia {

// Where rows lie: from some column on, in a buffer of the program.
struct RowPlace {
  int buffer;
  int64_t column;
};

// One of several products that are computed side by side. What points to weights and biases is its owner's.
struct RowProduct {
  RowPlace from;
  FewRowsForm form;
  const FewRowsWeights* weights;
  const float* bias;  // [N] or null
  RowPlace to;
};

// How a router chooses experts: by scores of its logits plus `bias` [experts], in groups of which the best two of each
// say which are used; see `Router` of the Python package.
struct RowRouter {
  int64_t active, groups, active_groups;
  bool softmax;    // scores are that, or sigmoids
  bool biased;     // weights are scores with the bias
  bool normalize;  // weights are divided by their sum
  double factor;
  std::vector<float> bias;
};

// Experts' weights, which are their owner's: gate and up [E, 2 F, D], down [E, D, F].
struct RowExperts {
  FewRowsForm gate_up, down;
  const std::vector<FewRowsWeights>&all_gate_up, &all_down;
};

// The rows of a call, in the buffers, and what runs them.
struct RowFrame {
  std::vector<Rows> buffers;
  int64_t rows;
  int threads;

  Rows at(const RowPlace& place) const { return buffers[size_t(place.buffer)].columns_from(place.column); }
};

class RowStep {
 public:
  virtual ~RowStep() = default;
  virtual void run(const RowFrame& frame) const = 0;
};

class RowProgram {
 public:
  explicit RowProgram(const Kernels& kernels) : kernels_(kernels) {}
  RowProgram(RowProgram&&) = default;

  struct Buffer {
    int64_t width;
    Dtype dtype;
    bool given;  // by the caller, at each call; else memory of the thread
  };
  const std::vector<Buffer>& buffers() const { return buffers_; }
  int64_t given() const { return given_; }

  int add_buffer(int64_t width, bool given, Dtype dtype);

  // What follows throws std::invalid_argument where numbers would lie outside of their buffer.
  void norm(RowPlace from, RowPlace to, std::vector<float> weight, double eps);
  // Side by side: threads meet once.
  void products(std::vector<RowProduct> products);
  // `count` pieces of a row, each with its matrix; the pieces of x begin `from_step` numbers after each other.
  void product_of_each(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step, const FewRowsForm& form,
                       const std::vector<FewRowsWeights>& weights);
  void swiglu(RowPlace gate, RowPlace up, RowPlace to, int64_t width);
  // The weighted sum of what the chosen experts give; `logits` are float32.
  void experts(RowPlace from, RowPlace logits, RowRouter router, const RowExperts& experts, RowPlace to);
  void add(RowPlace from, double scale, RowPlace to, int64_t width);
  // `count` pieces of `width` numbers.
  void copy(RowPlace from, int64_t from_step, RowPlace to, int64_t to_step, int64_t width, int64_t count);

  // `given` are the rows of the buffers that are given, in the order in which those were added.
  void run(const std::vector<Rows>& given, int64_t rows, int threads) const;

 private:
  const Kernels& kernels_;
  std::vector<Buffer> buffers_;
  std::vector<std::unique_ptr<RowStep>> steps_;
  int64_t given_ = 0;

  void check(const RowPlace& place, int64_t width, int64_t step = 0, int64_t count = 1) const;
};

}  // namespace intarsia
