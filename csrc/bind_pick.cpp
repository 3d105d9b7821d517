#include <algorithm>
#include <limits>

#include "bindings.h"
#include "dispatch.h"
#include "pick.h"

namespace intarsia {

namespace {

using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using Picked = nb::ndarray<int32_t, nb::ndim<3>, nb::device::cpu, nb::c_contig>;

bool is_row_of_numbers(const Array& x, int dims) {
  return x.dtype == Dtype::float32 && x.dims == dims && (x.shape[dims - 1] < 2 || x.stride[dims - 1] == 1);
}

void products(const Tensor& q, const Tensor& k, const std::optional<Indices>& pages, int64_t count, const Tensor& out,
              const std::string& isa, int threads) {
  PickProducts call;
  call.q = array_of(q), call.products = array_of(out), call.count = count;
  const Array keys = array_of(k);
  const int64_t bytes = size_of(keys.dtype);
  if (keys.dims != (pages ? 4 : 3) || keys.dtype == Dtype::float64 ||
      (keys.shape[keys.dims - 1] > 1 && keys.stride[keys.dims - 1] != 1))
    throw std::invalid_argument("keys must be [S, heads, K], or [pages, page_size, heads, K] with pages, without gaps");
  const int64_t heads = keys.shape[keys.dims - 2], K = keys.shape[keys.dims - 1];
  if (!is_row_of_numbers(call.q, 3) || !is_row_of_numbers(call.products, 3) || call.q.shape[2] != K || heads < 1 ||
      call.q.shape[1] % heads || call.products.shape[0] != call.q.shape[0] ||
      call.products.shape[1] != call.q.shape[1] || call.products.shape[2] < count)
    throw std::invalid_argument("q [T, H, K], keys and products [T, H, S] do not fit together");
  call.dtype = keys.dtype, call.heads = heads;
  if (pages) {
    const int64_t size = keys.shape[1];
    if ((count + size - 1) / size > int64_t(pages->shape(0))) throw std::invalid_argument("keys lie in no page");
    for (int64_t i = 0; i < (count + size - 1) / size; i++)
      if (pages->data()[i] < 0 || pages->data()[i] >= keys.shape[0])
        throw std::invalid_argument("keys lie in a page that there is not");
    call.keys = {
        keys.data, pages->data(), size, keys.stride[0] * bytes, keys.stride[1] * bytes, keys.stride[2] * bytes};
  } else {
    if (count > keys.shape[0]) throw std::invalid_argument("there are fewer keys");
    call.keys = {keys.data, nullptr, 1, 0, keys.stride[0] * bytes, keys.stride[1] * bytes};
  }
  const PickKernels& kernels = kernels_of(isa).pick;
  nb::gil_scoped_release release;
  pick_products(call, kernels, threads);
}

void run(const Tensor& products, const MaybeTensor& weights, int64_t place, int64_t stride, int64_t width,
         int64_t block, int groups, int64_t count, int64_t first, int64_t last, bool softmax, bool summed, bool relu,
         bool tail, Picked out, const std::string& isa, int threads) {
  PickCall call{};
  call.products = array_of(products);
  if (!is_row_of_numbers(call.products, 3)) throw std::invalid_argument("products must be [T, H, S] in float32");
  const int64_t T = call.products.shape[0], H = call.products.shape[1], S = call.products.shape[2];
  if (stride < 1 || width < 1 || block < 1 || groups < 1 || count < 1 || first < 0 || last < 0 || width % stride ||
      block % stride || H % groups || place < 0 || (place + T) / stride > S)
    throw std::invalid_argument("the numbers of the choice do not fit together");
  const int64_t blocks = tail ? (place + T) / block : (place + T + block - 1) / block;
  if (int64_t(out.shape(0)) != T || int64_t(out.shape(1)) != groups ||
      int64_t(out.shape(2)) < std::min(count, blocks) + (tail && block > 1))
    throw std::invalid_argument("there is no room for what is picked");
  if (weights) {
    const Array array = array_of(*weights);
    if (!is_row_of_numbers(array, 2) || array.shape[0] != T || array.shape[1] != H || (T > 1 && array.stride[0] != H))
      throw std::invalid_argument("weights must be [T, H] in float32, without gaps");
    call.weights = reinterpret_cast<const float*>(array.data);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  call.form = {int(H),
               groups,
               tail ? 1 : block / stride,
               width / stride,
               softmax,
               relu,
               summed,
               tail ? infinity : std::numeric_limits<float>::max()};
  call.place = place, call.stride = stride, call.block = block, call.count = count, call.first = first;
  call.last = last, call.tail = tail, call.out = out.data(), call.slots = int64_t(out.shape(2));
  const PickKernels& kernels = kernels_of(isa).pick;
  nb::gil_scoped_release release;
  pick(call, kernels, threads);
}

}  // namespace

void bind_pick(nb::module_& m) {
  m.def("pick_products", &products, "q"_a, "k"_a, "pages"_a.none(), "count"_a, "out"_a, "isa"_a, "threads"_a);
  m.def("pick", &run, "products"_a, "weights"_a.none(), "place"_a, "stride"_a, "width"_a, "block"_a, "groups"_a,
        "count"_a, "first"_a, "last"_a, "softmax"_a, "summed"_a, "relu"_a, "tail"_a, "out"_a, "isa"_a, "threads"_a);
}

}  // namespace intarsia
