// How Python's arrays become the kernels' own: through DLPack, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace intarsia {

using Tensor = nb::ndarray<nb::device::cpu>;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  const auto dtype = tensor.dtype();
  if (dtype == nb::dtype<float>()) return Dtype::float32;
  if (dtype == nb::dtype<double>()) return Dtype::float64;
  if (dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Dtype::bfloat16;
  throw std::invalid_argument("the kernels take float32, float64 and bfloat16");
}

inline Array array_of(const Tensor& tensor) {
  Array array;
  array.data = static_cast<char*>(tensor.data());
  if (!array.data && tensor.size()) throw std::invalid_argument("the kernels take tensors that have memory");
  array.dtype = dtype_of(tensor);
  array.dims = int(tensor.ndim());
  for (int d = 0; d < array.dims; d++) {
    array.shape[d] = int64_t(tensor.shape(size_t(d)));
    array.stride[d] = tensor.stride(size_t(d));
  }
  return array;
}
inline Array array_of(const MaybeTensor& tensor) { return tensor ? array_of(*tensor) : Array{}; }

// Each family of operators adds its own functions to the module.
void bind_attend(nb::module_& m);
void bind_conv(nb::module_& m);
void bind_decode(nb::module_& m);
void bind_few_rows(nb::module_& m);
void bind_gathered(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_norm(nb::module_& m);
void bind_pick(nb::module_& m);
void bind_row_program(nb::module_& m);
void bind_softmax(nb::module_& m);
void bind_swiglu(nb::module_& m);

}  // namespace intarsia
