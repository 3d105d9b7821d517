#include "bindings.h"
#include "dispatch.h"
#include "linear.h"

namespace intarsia {

namespace {

LinearCall linear_call(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& g, const MaybeTensor& beta,
                       const MaybeTensor& A_log, const MaybeTensor& dt_bias, const MaybeTensor& initial,
                       std::vector<int64_t> edges, double scale, bool normalize, bool gated, double lower_bound,
                       double beta_scale) {
  LinearCall call{};
  call.q = array_of(q), call.k = array_of(k), call.v = array_of(v);
  call.g = array_of(g), call.beta = array_of(beta), call.initial = array_of(initial);
  call.A_log = array_of(A_log), call.dt_bias = array_of(dt_bias);
  call.edges = std::move(edges);
  call.scale = scale;
  call.decay = !g ? Decay::none : g->ndim() == 4 ? Decay::channel : Decay::head;
  call.normalize = normalize;
  call.gate = !gated ? Gate::none : lower_bound < 0 ? Gate::bounded : Gate::softplus;
  call.lower_bound = lower_bound;
  call.beta_scale = beta_scale;
  return call;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def(
      "linear_forward",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& g, const MaybeTensor& beta,
         const MaybeTensor& A_log, const MaybeTensor& dt_bias, const MaybeTensor& initial, std::vector<int64_t> edges,
         double scale, bool normalize, bool gated, double lower_bound, double beta_scale, const Tensor& o,
         const MaybeTensor& final, const MaybeTensor& z, const MaybeTensor& chunk_states, const std::string& isa,
         int threads) {
        LinearCall call = linear_call(q, k, v, g, beta, A_log, dt_bias, initial, std::move(edges), scale, normalize,
                                      gated, lower_bound, beta_scale);
        call.o = array_of(o), call.final = array_of(final);
        call.z = array_of(z), call.chunk_states = array_of(chunk_states);
        const LinearKernels& kernels = kernels_of(isa).linear;
        nb::gil_scoped_release release;
        linear_forward(call, kernels, threads);
      },
      "q"_a, "k"_a, "v"_a, "g"_a.none(), "beta"_a.none(), "A_log"_a.none(), "dt_bias"_a.none(), "initial"_a.none(),
      "edges"_a, "scale"_a, "normalize"_a, "gated"_a, "lower_bound"_a, "beta_scale"_a, "o"_a, "final"_a.none(),
      "z"_a.none(), "chunk_states"_a.none(), "isa"_a, "threads"_a);

  m.def(
      "linear_backward",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& g, const MaybeTensor& beta,
         const MaybeTensor& A_log, const MaybeTensor& dt_bias, const MaybeTensor& initial, std::vector<int64_t> edges,
         double scale, bool normalize, bool gated, double lower_bound, double beta_scale, const MaybeTensor& z,
         const Tensor& chunk_states, const Tensor& d_o, const MaybeTensor& d_final, const Tensor& d_q,
         const Tensor& d_k, const Tensor& d_v, const MaybeTensor& d_g, const MaybeTensor& d_beta,
         const MaybeTensor& d_A_log, const MaybeTensor& d_dt_bias, const MaybeTensor& d_initial, const std::string& isa,
         int threads) {
        LinearCall call = linear_call(q, k, v, g, beta, A_log, dt_bias, initial, std::move(edges), scale, normalize,
                                      gated, lower_bound, beta_scale);
        call.z = array_of(z), call.chunk_states = array_of(chunk_states);
        const LinearGradientArrays grads{array_of(d_o),     array_of(d_final),  array_of(d_q),    array_of(d_k),
                                         array_of(d_v),     array_of(d_g),      array_of(d_beta), array_of(d_initial),
                                         array_of(d_A_log), array_of(d_dt_bias)};
        const LinearKernels& kernels = kernels_of(isa).linear;
        nb::gil_scoped_release release;
        linear_backward(call, grads, kernels, threads);
      },
      "q"_a, "k"_a, "v"_a, "g"_a.none(), "beta"_a.none(), "A_log"_a.none(), "dt_bias"_a.none(), "initial"_a.none(),
      "edges"_a, "scale"_a, "normalize"_a, "gated"_a, "lower_bound"_a, "beta_scale"_a, "z"_a.none(), "chunk_states"_a,
      "d_o"_a, "d_final"_a.none(), "d_q"_a, "d_k"_a, "d_v"_a, "d_g"_a.none(), "d_beta"_a.none(), "d_A_log"_a.none(),
      "d_dt_bias"_a.none(), "d_initial"_a.none(), "isa"_a, "threads"_a);
}

}  // namespace intarsia
