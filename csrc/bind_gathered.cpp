#include <vector>

#include "bindings.h"
#include "dispatch.h"
#include "gathered.h"

namespace intarsia {

namespace {

using Picked = nb::ndarray<const int32_t, nb::ndim<3>, nb::device::cpu, nb::c_contig>;

bool is(const Array& x, int64_t rows, int64_t heads, int64_t dim) {
  return x.dims == 3 && x.shape[0] == rows && x.shape[1] == heads && x.shape[2] == dim &&
         (dim < 2 || x.stride[2] == 1) && x.dtype != Dtype::float64;
}

GatheredCall checked(const Tensor& q, const Tensor& k, const Tensor& v, const Picked& picked,
                     const std::vector<int64_t>& edges, int64_t block, double scale, const Tensor& o,
                     const Tensor& log_sum) {
  GatheredCall call{};
  call.q = array_of(q), call.k = array_of(k), call.v = array_of(v), call.o = array_of(o);
  const Array sums = array_of(log_sum);
  if (call.q.dims != 3 || call.k.dims != 3 || call.v.dims != 3)
    throw std::invalid_argument("queries, keys and values must be [R, heads, dim]");
  const int64_t R = call.q.shape[0], H = call.q.shape[1], K = call.q.shape[2], HKV = call.k.shape[1],
                V = call.v.shape[2], G = int64_t(picked.shape(1));
  if (!is(call.q, R, H, K) || !is(call.k, R, HKV, K) || !is(call.v, R, HKV, V) || !is(call.o, R, H, V) || HKV < 1 ||
      G < 1 || H % HKV || H % G || (HKV % G && G % HKV) || int64_t(picked.shape(0)) != R || block < 1)
    throw std::invalid_argument("q [R, H, K], keys, values, picked [R, G, n] and o [R, H, V] do not fit together");
  if (sums.dtype != Dtype::float32 || sums.dims != 2 || sums.shape[0] != R || sums.shape[1] != H ||
      sums.stride[1] != 1 || sums.stride[0] != H)
    throw std::invalid_argument("the sums must be [R, H] in float32, without gaps");
  if (edges.size() < 2 || edges[0] != 0 || edges.back() != R)
    throw std::invalid_argument("the edges of sequences go from 0 to the number of rows");
  for (size_t n = 1; n < edges.size(); n++)
    if (edges[n] < edges[n - 1]) throw std::invalid_argument("the edges of sequences rise");
  call.picked = picked.data(), call.groups = G, call.slots = int64_t(picked.shape(2)), call.block = block;
  call.scale = float(scale), call.edges = edges.data(), call.count = int64_t(edges.size()) - 1;
  call.log_sum = reinterpret_cast<float*>(sums.data);
  return call;
}

}  // namespace

void bind_gathered(nb::module_& m) {
  m.def(
      "gathered_forward",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Picked& picked, const std::vector<int64_t>& edges,
         int64_t block, double scale, const Tensor& o, const Tensor& log_sum, const std::string& isa, int threads) {
        const GatheredCall call = checked(q, k, v, picked, edges, block, scale, o, log_sum);
        const GatheredKernels& kernels = kernels_of(isa).gathered;
        nb::gil_scoped_release release;
        gathered_forward(call, kernels, threads);
      },
      "q"_a, "k"_a, "v"_a, "picked"_a, "edges"_a, "block"_a, "scale"_a, "o"_a, "log_sum"_a, "isa"_a, "threads"_a);

  m.def(
      "gathered_backward",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Picked& picked, const std::vector<int64_t>& edges,
         int64_t block, double scale, const Tensor& d_o, const Tensor& log_sum, const Tensor& d_q, const Tensor& d_k,
         const Tensor& d_v, const std::string& isa, int threads) {
        const GatheredCall call = checked(q, k, v, picked, edges, block, scale, d_o, log_sum);
        const Array of_q = array_of(d_q), of_k = array_of(d_k), of_v = array_of(d_v);
        const int64_t R = call.q.shape[0];
        if (!is(of_q, R, call.q.shape[1], call.q.shape[2]) || !is(of_k, R, call.k.shape[1], call.k.shape[2]) ||
            !is(of_v, R, call.v.shape[1], call.v.shape[2]))
          throw std::invalid_argument("the gradients must have the shapes of q, k and v");
        const GatheredKernels& kernels = kernels_of(isa).gathered;
        nb::gil_scoped_release release;
        gathered_backward(call, of_q, of_k, of_v, kernels, threads);
      },
      "q"_a, "k"_a, "v"_a, "picked"_a, "edges"_a, "block"_a, "scale"_a, "d_o"_a, "log_sum"_a, "d_q"_a, "d_k"_a, "d_v"_a,
      "isa"_a, "threads"_a);
}

}  // namespace intarsia
