#include <nanobind/stl/pair.h>

#include "bindings.h"
#include "decode.h"
#include "dispatch.h"

namespace intarsia {

namespace {

// A step takes microseconds, and as many would go by if each tensor were handed over through DLPack. So Python, which
// has checked them, gives their addresses, and a number for their dtype: that of `Dtype`, or -1 for no tensor.
Rows rows_at(uintptr_t address, int dtype, int64_t numbers = 0) {
  if (dtype < 0) return {};
  const Dtype type = Dtype(dtype);
  return {reinterpret_cast<char*>(address), numbers * size_of(type), type};
}

struct DecodeStep {
  DecodeLayer layer;
  int64_t decays;  // numbers of a token's decay; 0 where all tokens share one
  const DecodeKernels& kernels;
  bool wide;
};

// An address and a dtype.
using Place = std::pair<uintptr_t, int>;
Rows rows_at(const Place& place) { return rows_at(place.first, place.second); }

void construct(DecodeStep* self, int H, int HV, int K, int V, double scale, bool erases, bool normalize, int decay,
               int64_t decays, int gate, double bound, double beta_scale, Place A_log, Place dt_bias, int W, bool silu,
               Place conv_weight, Place norm_weight, double norm_eps, int output_gate, bool wide,
               const std::string& isa) {
  DecodeLayer layer{};
  layer.H = H, layer.HV = HV, layer.K = K, layer.V = V;
  layer.scale = scale, layer.erases = erases, layer.normalize = normalize;
  layer.decay = Decay(decay), layer.gate = Gate(gate), layer.bound = bound, layer.beta_scale = beta_scale;
  layer.A_log = rows_at(A_log), layer.dt_bias = rows_at(dt_bias);
  layer.W = W, layer.silu = silu, layer.conv_weight = rows_at(conv_weight);
  layer.norm_weight = rows_at(norm_weight), layer.norm_eps = norm_eps, layer.output_gate = OutputGate(output_gate);
  new (self) DecodeStep{layer, decays, kernels_of(isa).decode, wide};
}

void run(const DecodeStep& self, uintptr_t x, int x_dtype, uintptr_t g, int g_dtype, uintptr_t beta, int beta_dtype,
         uintptr_t z, int z_dtype, uintptr_t o, int64_t sequences, uintptr_t edges, uintptr_t read, uintptr_t write,
         uintptr_t board_from, uintptr_t conv_from, uintptr_t board_to, uintptr_t conv_to, int threads) {
  const DecodeLayer& layer = self.layer;
  const int64_t values = int64_t(layer.HV) * layer.V;
  const auto slots = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  const auto pool = [](uintptr_t board, uintptr_t conv) {
    return DecodePool{reinterpret_cast<char*>(board), reinterpret_cast<char*>(conv)};
  };
  const DecodeCall call{rows_at(x, x_dtype, layer.channels()),
                        rows_at(g, g_dtype, self.decays),
                        rows_at(beta, beta_dtype, layer.HV),
                        rows_at(z, z_dtype, values),
                        rows_at(o, x_dtype, values),
                        sequences,
                        slots(edges),
                        slots(read),
                        slots(write),
                        pool(board_from, conv_from),
                        pool(board_to, conv_to)};
  nb::gil_scoped_release release;
  decode(layer, call, self.kernels, self.wide, threads);
}

}  // namespace

void bind_decode(nb::module_& m) {
  nb::class_<DecodeStep>(m, "DecodeStep", "A layer's decode step. It keeps addresses: the caller keeps the tensors.")
      .def("__init__", &construct, "H"_a, "HV"_a, "K"_a, "V"_a, "scale"_a, "erases"_a, "normalize"_a, "decay"_a,
           "decays"_a, "gate"_a, "bound"_a, "beta_scale"_a, "A_log"_a, "dt_bias"_a, "W"_a, "silu"_a, "conv_weight"_a,
           "norm_weight"_a, "norm_eps"_a, "output_gate"_a, "wide"_a, "isa"_a)
      .def("run", &run);
}

}  // namespace intarsia
