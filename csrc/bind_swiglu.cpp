#include "bindings.h"
#include "dispatch.h"
#include "swiglu.h"

namespace intarsia {

void bind_swiglu(nb::module_& m) {
  m.def(
      "swiglu_forward",
      [](const Tensor& gate, const Tensor& up, const Tensor& y, const std::string& isa, int threads) {
        const Array g = array_of(gate), u = array_of(up), out = array_of(y);
        const SwigluKernels& kernels = kernels_of(isa).swiglu;
        nb::gil_scoped_release release;
        swiglu_forward(g, u, out, kernels, threads);
      },
      "gate"_a, "up"_a, "y"_a, "isa"_a, "threads"_a);

  m.def(
      "swiglu_backward",
      [](const Tensor& gate, const Tensor& up, const Tensor& d_y, const Tensor& d_gate, const Tensor& d_up,
         const std::string& isa, int threads) {
        const Array g = array_of(gate), u = array_of(up), given = array_of(d_y), of_gate = array_of(d_gate),
                    of_up = array_of(d_up);
        const SwigluKernels& kernels = kernels_of(isa).swiglu;
        nb::gil_scoped_release release;
        swiglu_backward(g, u, given, of_gate, of_up, kernels, threads);
      },
      "gate"_a, "up"_a, "d_y"_a, "d_gate"_a, "d_up"_a, "isa"_a, "threads"_a);
}

}  // namespace intarsia
