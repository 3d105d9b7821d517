#include <nanobind/stl/pair.h>

#include "bind_few_rows.h"
#include "bindings.h"
#include "dispatch.h"
#include "row_program.h"

namespace intarsia {

namespace {

// A program, and whoever owns the weights that it points to.
struct Program {
  RowProgram program;
  std::vector<nb::object> owners;
  std::vector<std::unique_ptr<std::vector<float>>> biases;
};

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw std::invalid_argument("row programs take float32 and bfloat16");
}

std::vector<float> floats(const Tensor& tensor, const char* name) {
  const Array array = array_of(tensor);
  if (array.dtype != Dtype::float32 || array.dims != 1 || (array.shape[0] > 1 && array.stride[0] != 1))
    throw std::invalid_argument(std::string(name) + " must be one row of float32");
  const float* first = reinterpret_cast<const float*>(array.data);
  return {first, first + array.shape[0]};
}

const FewRowsMatrices& matrices_of(Program& self, nb::handle weights) {
  self.owners.push_back(nb::borrow(weights));
  return nb::cast<const FewRowsMatrices&>(weights);
}

using Places = std::vector<std::pair<int, int64_t>>;

void products(Program& self, const Places& from, const nb::list& weights, const Places& to,
              const std::vector<MaybeTensor>& biases) {
  std::vector<RowProduct> all;
  if (weights.size() != to.size() || from.size() != to.size() || to.size() != biases.size())
    throw std::invalid_argument("each product has weights, two places and a bias or none");
  for (size_t i = 0; i < to.size(); i++) {
    const FewRowsMatrices& each = matrices_of(self, weights[i]);
    if (each.weights.size() != 1) throw std::invalid_argument("a product is with one matrix");
    const float* bias = nullptr;
    if (biases[i]) {
      self.biases.push_back(std::make_unique<std::vector<float>>(floats(*biases[i], "bias")));
      if (int64_t(self.biases.back()->size()) != each.form.N) throw std::invalid_argument("bias must be [N]");
      bias = self.biases.back()->data();
    }
    all.push_back({{from[i].first, from[i].second}, each.form, each.weights.data(), bias, {to[i].first, to[i].second}});
  }
  self.program.products(std::move(all));
}

void experts(Program& self, int from, int64_t from_column, int logits, int64_t logits_column, int64_t active,
             int64_t groups, int64_t active_groups, bool softmax, bool biased, bool normalize, double factor,
             const Tensor& bias, nb::handle gate_up, nb::handle down, int to, int64_t to_column) {
  const FewRowsMatrices &up = matrices_of(self, gate_up), &back = matrices_of(self, down);
  self.program.experts({from, from_column}, {logits, logits_column},
                       {active, groups, active_groups, softmax, biased, normalize, factor, floats(bias, "bias")},
                       {up.form, back.form, up.weights, back.weights}, {to, to_column});
}

void run(const Program& self, const nb::list& tensors, int threads) {
  std::vector<Rows> given;
  int64_t rows = -1;
  size_t next = 0;
  if (int64_t(tensors.size()) != self.program.given()) throw std::invalid_argument("give every buffer that is given");
  for (const RowProgram::Buffer& buffer : self.program.buffers()) {
    if (!buffer.given) continue;
    Array array;
    if (!view_tensor(tensors[next++], array) || array.dims != 2 || array.dtype != buffer.dtype ||
        array.shape[1] != buffer.width || (buffer.width > 1 && array.stride[1] != 1) ||
        (rows >= 0 && array.shape[0] != rows))
      throw std::invalid_argument("a tensor of a row program is not as its buffer, or has gaps");
    rows = array.shape[0];
    given.push_back({array.data, array.stride[0] * size_of(array.dtype), array.dtype});
  }
  nb::gil_scoped_release release;
  self.program.run(given, rows, threads);
}

}  // namespace

void bind_row_program(nb::module_& m) {
  nb::class_<Program>(m, "RowProgram", "What is done to each row alone, as one call. It points to packed weights.")
      .def(
          "__init__",
          [](Program* self, const std::string& isa) { new (self) Program{RowProgram(kernels_of(isa)), {}, {}}; },
          "isa"_a)
      .def(
          "buffer",
          [](Program& self, int64_t width, bool given, const std::string& dtype) {
            return self.program.add_buffer(width, given, dtype_named(dtype));
          },
          "width"_a, "given"_a, "dtype"_a)
      .def(
          "norm",
          [](Program& self, int from, int64_t from_column, int to, int64_t to_column, const Tensor& weight,
             double eps) {
            self.program.norm({from, from_column}, {to, to_column}, floats(weight, "the norm's weight"), eps);
          },
          "from"_a, "from_column"_a, "to"_a, "to_column"_a, "weight"_a, "eps"_a)
      .def("products", &products, "from"_a, "weights"_a, "to"_a, "biases"_a)
      .def(
          "product_of_each",
          [](Program& self, int from, int64_t from_column, int64_t from_step, int to, int64_t to_column,
             int64_t to_step, nb::handle weights) {
            const FewRowsMatrices& each = matrices_of(self, weights);
            self.program.product_of_each({from, from_column}, from_step, {to, to_column}, to_step, each.form,
                                         each.weights);
          },
          "from"_a, "from_column"_a, "from_step"_a, "to"_a, "to_column"_a, "to_step"_a, "weights"_a)
      .def(
          "swiglu",
          [](Program& self, int gate, int64_t gate_column, int up, int64_t up_column, int to, int64_t to_column,
             int64_t width) { self.program.swiglu({gate, gate_column}, {up, up_column}, {to, to_column}, width); },
          "gate"_a, "gate_column"_a, "up"_a, "up_column"_a, "to"_a, "to_column"_a, "width"_a)
      .def(
          "add",
          [](Program& self, int from, int64_t from_column, double scale, int to, int64_t to_column, int64_t width) {
            self.program.add({from, from_column}, scale, {to, to_column}, width);
          },
          "from"_a, "from_column"_a, "scale"_a, "to"_a, "to_column"_a, "width"_a)
      .def("experts", &experts, "from"_a, "from_column"_a, "logits"_a, "logits_column"_a, "active"_a, "groups"_a,
           "active_groups"_a, "softmax"_a, "biased"_a, "normalize"_a, "factor"_a, "bias"_a, "gate_up"_a, "down"_a,
           "to"_a, "to_column"_a)
      .def(
          "copy",
          [](Program& self, int from, int64_t from_column, int64_t from_step, int to, int64_t to_column,
             int64_t to_step, int64_t width, int64_t count) {
            self.program.copy({from, from_column}, from_step, {to, to_column}, to_step, width, count);
          },
          "from"_a, "from_column"_a, "from_step"_a, "to"_a, "to_column"_a, "to_step"_a, "width"_a, "count"_a)
      .def("run", &run, "tensors"_a, "threads"_a);
}

}  // namespace intarsia
