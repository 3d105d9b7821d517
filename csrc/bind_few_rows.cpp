#include "bind_few_rows.h"

#include "bindings.h"
#include "dispatch.h"
#include "few_rows.h"

namespace intarsia {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::device::cpu, nb::c_contig>;
using Scales = std::optional<Asked>;  // kept as long as the matrices
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::float32;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  if (name == "int8") return WeightFormat::int8;
  if (name == "int4") return WeightFormat::int4;
  throw std::invalid_argument("there is no weight format '" + name + "'");
}

int64_t packed_row_bytes(WeightFormat format, int64_t K) {
  switch (format) {
    case WeightFormat::float32: return 4 * K;
    case WeightFormat::bfloat16: return 2 * K;
    case WeightFormat::int8: return (K + FEW_ROWS_STEP - 1) / FEW_ROWS_STEP * FEW_ROWS_STEP;
    case WeightFormat::int4: break;
  }
  return (K + INT4_BLOCK - 1) / INT4_BLOCK * (INT4_BLOCK / 2);
}

const uint16_t* numbers_of(const Scales& given, int64_t count, const char* name) {
  if (!given) return nullptr;
  const Array array = array_of(*given);
  if (array.dtype != Dtype::bfloat16 || int64_t(given->size()) != count)
    throw std::invalid_argument(std::string(name) + " must be bfloat16, one of each group");
  return reinterpret_cast<const uint16_t*>(array.data);
}

// `data` [E, N, bytes of a row]; `scales` and `zeros` [E, N, groups].
void construct(FewRowsMatrices* self, const std::string& format, const Bytes& data, int64_t matrices, int64_t N,
               int64_t K, int64_t group, const Scales& scales, const Scales& zeros, const std::string& isa) {
  FewRowsForm form{};
  form.format = format_of(format);
  form.N = N, form.K = K, form.row_bytes = packed_row_bytes(form.format, K);
  const bool scaled = form.format == WeightFormat::int8 || form.format == WeightFormat::int4;
  form.group = scaled ? group : 0, form.groups = scaled ? (K + group - 1) / group : 0;
  form.zeros = zeros.has_value();
  if (matrices < 1 || N < 1 || K < 1) throw std::invalid_argument("there must be weights");
  if (scaled && (group < 1 || (group < K && (group % FEW_ROWS_STEP))))
    throw std::invalid_argument("a group must be a multiple of 32 numbers, or a whole row");
  // Of int4, in whole blocks or as a part of one.
  if (form.format == WeightFormat::int4) {
    if (group >= K) form.group = (K + INT4_BLOCK - 1) / INT4_BLOCK * INT4_BLOCK;
    if (form.group % INT4_BLOCK && form.group != 32 && form.group != 64)
      throw std::invalid_argument("a group of int4 must be 32, 64 or a multiple of 128 numbers, or a whole row");
  }
  if (scaled != scales.has_value() || (zeros && !scaled))
    throw std::invalid_argument("integers have scales, and floating-point numbers have none");
  if (int64_t(data.size()) != matrices * N * form.row_bytes)
    throw std::invalid_argument("the weights do not have the bytes of their shape and format");
  const uint16_t *scale = numbers_of(scales, matrices * N * form.groups, "scales"),
                 *zero = numbers_of(zeros, matrices * N * form.groups, "zeros");
  new (self) FewRowsMatrices{form, {}, {}, kernels_of(isa).few_rows};
  for (int64_t e = 0; e < matrices; e++) {
    const int64_t at = e * N * form.groups;
    self->weights.push_back({reinterpret_cast<const char*>(data.data()) + e * N * form.row_bytes,
                             scale ? scale + at : nullptr, zero ? zero + at : nullptr});
  }
  self->owners.push_back(nb::cast(data));
  if (scales) self->owners.push_back(nb::cast(*scales));
  if (zeros) self->owners.push_back(nb::cast(*zeros));
}

// Called for every layer of every token: the tensors are looked at the quick way, where there is one.
Array view_of(nb::handle tensor) {
  Array array;
  if (!view_tensor(tensor, array)) throw std::invalid_argument("the kernels take plain tensors that they can read");
  return array;
}

void product(const FewRowsMatrices& self, nb::handle x, nb::handle y, const std::optional<Indices>& matrix_of_row,
             nb::handle bias, int threads) {
  FewRowsCall call{self.form, self.weights, view_of(x), view_of(y), nullptr, nullptr};
  call.form.x = call.x.dtype;
  const int64_t rows = call.x.shape[0];
  if (call.x.dims != 2 || call.y.dims != 2 || call.x.shape[1] != self.form.K || call.y.shape[1] != self.form.N ||
      call.y.shape[0] != rows || (self.form.K > 1 && call.x.stride[1] != 1) ||
      (self.form.N > 1 && call.y.stride[1] != 1))
    throw std::invalid_argument("x must be [R, K] and y [R, N], with rows without gaps");
  if (call.x.dtype == Dtype::float64 || call.y.dtype == Dtype::float64)
    throw std::invalid_argument("products with few rows take float32 and bfloat16");
  const int64_t matrices = int64_t(self.weights.size());
  if (matrix_of_row) {
    if (int64_t(matrix_of_row->size()) != rows) throw std::invalid_argument("each row has one matrix");
    call.matrix_of_row = matrix_of_row->data();
    for (int64_t i = 0; i < rows; i++)
      if (call.matrix_of_row[i] < 0 || call.matrix_of_row[i] >= matrices)
        throw std::invalid_argument("a row has a matrix that there is not");
  } else if (matrices != 1) {
    throw std::invalid_argument("there are several matrices: say which a row has");
  }
  if (!bias.is_none()) {
    const Array array = view_of(bias);
    if (array.dtype != Dtype::float32 || array.dims != 1 || array.shape[0] != self.form.N || matrices != 1 ||
        (self.form.N > 1 && array.stride[0] != 1))
      throw std::invalid_argument("bias must be [N] in float32, of one matrix");
    call.bias = reinterpret_cast<const float*>(array.data);
  }
  nb::gil_scoped_release release;
  if (rows) few_rows(call, self.kernels, threads);
}

void unpack(const FewRowsMatrices& self, nb::handle to, int64_t first, int threads) {
  const Array array = view_of(to);
  if (self.form.groups == 0 || self.weights.size() != 1)
    throw std::invalid_argument("what is unpacked is one matrix of integers");
  if (array.dtype != Dtype::bfloat16 || array.dims != 2 || array.shape[1] != self.form.K ||
      (self.form.K > 1 && array.stride[1] != 1) || first < 0 || first + array.shape[0] > self.form.N)
    throw std::invalid_argument("unpacked rows are [rows, K] bfloat16 without gaps, of rows that there are");
  nb::gil_scoped_release release;
  if (array.shape[0]) unpack_rows(self.form, self.weights[0], first, array, self.kernels, threads);
}

}  // namespace

void bind_few_rows(nb::module_& m) {
  nb::class_<FewRowsMatrices>(m, "FewRows", "Weights that few rows are multiplied with. They stay where they are.")
      .def("__init__", &construct, "format"_a, "data"_a, "matrices"_a, "N"_a, "K"_a, "group"_a, "scales"_a.none(),
           "zeros"_a.none(), "isa"_a)
      .def("product", &product, "x"_a, "y"_a, "matrix_of_row"_a.none(), "bias"_a.none(), "threads"_a)
      .def_prop_ro("integers", [](const FewRowsMatrices& self) { return self.form.groups > 0; })
      .def("unpack", &unpack, "to"_a, "first"_a, "threads"_a);
}

}  // namespace intarsia
