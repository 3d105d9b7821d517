// How Python's tensors become the kernels' own: through DLPack, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "exchange.h"

using namespace nb::literals;

namespace intarsia {

using Asked = nb::ndarray<nb::device::cpu>;

// What a function is given for a tensor. PyTorch's own take tens of nanoseconds; all else is asked by `__dlpack__`,
// which takes microseconds, and may refuse.
struct Tensor {
  Array viewed;
  std::optional<Asked> asked;

  int ndim() const { return asked ? int(asked->ndim()) : viewed.dims; }
};
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const nb::dlpack::dtype& dtype) {
  if (dtype == nb::dtype<float>()) return Dtype::float32;
  if (dtype == nb::dtype<double>()) return Dtype::float64;
  if (dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Dtype::bfloat16;
  throw std::invalid_argument("the kernels take float32, float64 and bfloat16");
}

inline Array array_of(const Asked& asked) {
  Array array;
  array.data = static_cast<char*>(asked.data());
  if (!array.data && asked.size()) throw std::invalid_argument("the kernels take tensors that have memory");
  array.dtype = dtype_of(asked.dtype());
  array.dims = int(asked.ndim());
  for (int d = 0; d < array.dims; d++) {
    array.shape[d] = int64_t(asked.shape(size_t(d)));
    array.stride[d] = asked.stride(size_t(d));
  }
  return array;
}
inline Array array_of(const Tensor& tensor) { return tensor.asked ? array_of(*tensor.asked) : tensor.viewed; }
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

template <>
struct nanobind::detail::type_caster<intarsia::Tensor> {
  NB_TYPE_CASTER(intarsia::Tensor, const_name("tensor"))

  bool from_python(handle from, uint8_t, cleanup_list*) noexcept {
    try {
      value.asked.reset();
      if (intarsia::view_tensor(from, value.viewed)) return true;
      intarsia::Asked asked;
      if (!nb::try_cast(from, asked)) return false;
      value.asked = asked;
      return true;
    } catch (...) {
      return false;
    }
  }
};
