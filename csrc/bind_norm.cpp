#include "bindings.h"
#include "dispatch.h"
#include "norm.h"

namespace intarsia {

namespace {

OutputGate gate_of(const std::string& name) {
  if (name == "none") return OutputGate::none;
  if (name == "sigmoid") return OutputGate::sigmoid;
  if (name == "swish") return OutputGate::swish;
  throw std::invalid_argument("there is no gate '" + name + "'");
}

}  // namespace

void bind_norm(nb::module_& m) {
  m.def(
      "norm_forward",
      [](const Tensor& o, const MaybeTensor& z, const Tensor& weight, double eps, const std::string& gate,
         const Tensor& y, const std::string& isa, int threads) {
        const NormCall call{array_of(o), array_of(z), array_of(weight), eps, gate_of(gate)};
        const Array out = array_of(y);
        const NormKernels& kernels = kernels_of(isa).norm;
        nb::gil_scoped_release release;
        norm_forward(call, out, kernels, threads);
      },
      "o"_a, "z"_a.none(), "weight"_a, "eps"_a, "gate"_a, "y"_a, "isa"_a, "threads"_a);

  m.def(
      "norm_backward",
      [](const Tensor& o, const MaybeTensor& z, const Tensor& weight, double eps, const std::string& gate,
         const Tensor& d_y, const Tensor& d_o, const MaybeTensor& d_z, const Tensor& d_weight, const std::string& isa,
         int threads) {
        const NormCall call{array_of(o), array_of(z), array_of(weight), eps, gate_of(gate)};
        const NormGradientArrays grads{array_of(d_y), array_of(d_o), array_of(d_z), array_of(d_weight)};
        const NormKernels& kernels = kernels_of(isa).norm;
        nb::gil_scoped_release release;
        norm_backward(call, grads, kernels, threads);
      },
      "o"_a, "z"_a.none(), "weight"_a, "eps"_a, "gate"_a, "d_y"_a, "d_o"_a, "d_z"_a.none(), "d_weight"_a, "isa"_a,
      "threads"_a);
}

}  // namespace intarsia
