// PyTorch's tensors by DLPack's table of C functions (DLPack 1.3, `__dlpack_c_exchange_api__`): tens of nanoseconds a
// tensor, where `__dlpack__` takes microseconds. Releases of PyTorch that do not have it yet are asked the slow way.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "array.h"

namespace nb = nanobind;

namespace intarsia {

// The table as DLPack lays it out; of its functions one is used.
struct ExchangeTable {
  struct {
    uint32_t major, minor;
  } version;
  const ExchangeTable* older;
  void (*unused[3])();
  int (*view)(void* object, nb::dlpack::dltensor* out);  // without a reference: valid while the tensor is as it is
  void (*unused_too)();
};

// The table of a type, or null.
inline const ExchangeTable* exchange_table(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;  // guarded by the interpreter's lock, like all that is called with objects
  static const ExchangeTable* table = nullptr;
  if (type == known) return table;
  known = type;
  table = nullptr;
  const nb::object capsule =
      nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_CheckExact(capsule.ptr()))
    table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) PyErr_Clear();
  while (table && table->version.major > 1) table = table->older;
  if (table && !table->view) table = nullptr;
  return table;
}

// Whether it is a tensor of PyTorch's own type or a parameter, and not of a type derived from them: what such a one
// means (another place, other numbers, no memory) is not what it has in memory.
inline bool is_plain(nb::handle tensor) {
  const auto type = [](const char* module, const char* name) {  // never given back: it outlives this module
    return nb::getattr(nb::module_::import_(module), name).release().ptr();
  };
  static PyObject* const types[] = {type("torch", "Tensor"), type("torch.nn", "Parameter")};
  PyObject* const own = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  return own == types[0] || own == types[1];
}

// What a tensor is, if the kernels can read it: of plain type, on the CPU, of a dtype that they know, of at most five
// dimensions.
inline bool view_tensor(nb::handle tensor, Array& array) {
  if (!is_plain(tensor)) return false;
  const auto fill = [&](int device, nb::dlpack::dtype dtype, char* data, int dims, auto shape, auto stride) {
    if (device != nb::device::cpu::value || dims > 5) return false;
    if (dtype == nb::dtype<float>())
      array.dtype = Dtype::float32;
    else if (dtype == nb::dtype<double>())
      array.dtype = Dtype::float64;
    else if (dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16)
      array.dtype = Dtype::bfloat16;
    else
      return false;
    array.data = data;
    array.dims = dims;
    int64_t numbers = 1;
    for (int d = 0; d < dims; d++) array.shape[d] = shape(d), array.stride[d] = stride(d), numbers *= shape(d);
    return data || !numbers;  // a wrapper of torch.func has none of its own
  };
  if (const ExchangeTable* table = exchange_table(Py_TYPE(tensor.ptr()))) {
    nb::dlpack::dltensor x;
    if (table->view(tensor.ptr(), &x) != 0) {
      PyErr_Clear();
      return false;
    }
    return fill(
        x.device.device_type, x.dtype, static_cast<char*>(x.data) + x.byte_offset, x.ndim,
        [&](int d) { return x.shape[d]; }, [&](int d) { return x.strides[d]; });
  }
  nb::ndarray<> x;
  if (!nb::try_cast(tensor, x)) return false;
  return fill(
      x.device_type(), x.dtype(), static_cast<char*>(x.data()), int(x.ndim()),
      [&](int d) { return int64_t(x.shape(size_t(d))); }, [&](int d) { return x.stride(size_t(d)); });
}

}  // namespace intarsia
