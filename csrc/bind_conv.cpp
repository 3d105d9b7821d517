#include "bindings.h"
#include "conv.h"
#include "dispatch.h"

namespace intarsia {

void bind_conv(nb::module_& m) {
  m.def(
      "conv_forward",
      [](const Tensor& x, const Tensor& weight, const MaybeTensor& initial, std::vector<int64_t> edges, bool silu,
         const Tensor& y, const MaybeTensor& final, const std::string& isa, int threads, std::vector<int64_t> read,
         std::vector<int64_t> write) {
        const ConvCall call{array_of(x), array_of(weight), array_of(initial), std::move(edges),
                            silu,        std::move(read),  std::move(write)};
        const Array out = array_of(y), state = array_of(final);
        const ConvKernels& kernels = kernels_of(isa).conv;
        nb::gil_scoped_release release;
        conv_forward(call, out, state, kernels, threads);
      },
      "x"_a, "weight"_a, "initial"_a.none(), "edges"_a, "silu"_a, "y"_a, "final"_a.none(), "isa"_a, "threads"_a,
      "read"_a = std::vector<int64_t>(), "write"_a = std::vector<int64_t>());

  m.def(
      "conv_backward",
      [](const Tensor& x, const Tensor& weight, const MaybeTensor& initial, std::vector<int64_t> edges, bool silu,
         const Tensor& d_y, const MaybeTensor& d_final, const Tensor& d_x, const Tensor& d_weight,
         const MaybeTensor& d_initial, const std::string& isa, int threads) {
        const ConvCall call{array_of(x), array_of(weight), array_of(initial), std::move(edges), silu, {}, {}};
        const ConvGradientArrays grads{array_of(d_y), array_of(d_final), array_of(d_x), array_of(d_weight),
                                       array_of(d_initial)};
        const ConvKernels& kernels = kernels_of(isa).conv;
        nb::gil_scoped_release release;
        conv_backward(call, grads, kernels, threads);
      },
      "x"_a, "weight"_a, "initial"_a.none(), "edges"_a, "silu"_a, "d_y"_a, "d_final"_a.none(), "d_x"_a, "d_weight"_a,
      "d_initial"_a.none(), "isa"_a, "threads"_a);
}

}  // namespace intarsia
