#include <algorithm>

#include "attend.h"
#include "bindings.h"
#include "dispatch.h"

namespace intarsia {

namespace {

using Indices = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig>;

// The entries of sequences: one tensor [B, S, heads, dim], one of each sequence [1, S_n, heads, dim], or pages
// [pages, page_size, heads, dim] with a table [N, most] of them.
struct Entries {
  std::vector<Array> arrays;
  const int64_t* table = nullptr;
  int64_t most = 0;

  Entries(const std::vector<Tensor>& tensors, const std::optional<Indices>& pages) {
    for (const Tensor& tensor : tensors) {
      const Array array = array_of(tensor);
      if (array.dims != 4 || (array.shape[3] > 1 && array.stride[3] != 1))
        throw std::invalid_argument("keys and values must be [.., .., heads, dim], with channels without gaps");
      arrays.push_back(array);
    }
    if (arrays.empty()) throw std::invalid_argument("there are no keys");
    if (pages) table = pages->data(), most = int64_t(pages->shape(1));
  }

  // `offset`: the number of the first entry of the tensors, which the sequence's entries up to `last` are in.
  AttendEntries of(int64_t n, int64_t last, int64_t held, int64_t offset) const {
    const Array& array = arrays.size() > 1 ? arrays.at(size_t(n)) : arrays[0];
    const int64_t bytes = size_of(array.dtype), batch = arrays.size() > 1 ? 0 : n;
    AttendEntries entries{array.data, nullptr, 1, 0, array.stride[1] * bytes, array.stride[2] * bytes};
    if (!table) {
      if (batch >= array.shape[0] || last - offset > array.shape[1] || offset > held)
        throw std::invalid_argument("there are fewer keys");
      entries.address += batch * array.stride[0] * bytes - offset * entries.entry_bytes;
      return entries;
    }
    entries.pages = table + n * most;
    entries.page_size = array.shape[1], entries.page_bytes = array.stride[0] * bytes;
    if (offset || last > most * entries.page_size) throw std::invalid_argument("the pages do not hold the keys");
    for (int64_t i = held / entries.page_size; i * entries.page_size < last; i++)
      if (entries.pages[i] < 0 || entries.pages[i] >= array.shape[0])
        throw std::invalid_argument("the block table points to a page that is not there");
    return entries;
  }
};

void run(const Tensor& q, const std::vector<Tensor>& k, const std::vector<Tensor>& v,
         const std::optional<Indices>& pages, const std::vector<int64_t>& edges, const std::vector<int64_t>& lengths,
         const std::vector<int64_t>& held, double scale, int64_t window, const MaybeTensor& sinks, const Tensor& o,
         const MaybeTensor& carried, bool last, const std::string& isa, int threads) {
  AttendCall call{};
  call.q = array_of(q), call.o = array_of(o);
  const Entries keys(k, pages), values(v, pages);
  const Array &key = keys.arrays[0], &value = values.arrays[0];
  const int64_t H = call.q.dims == 3 ? call.q.shape[1] : 0, K = call.q.shape[2], V = value.shape[3];
  call.HKV = int(key.shape[2]);
  if (H < 1 || call.o.dims != 3 || call.o.shape[0] != call.q.shape[0] || call.o.shape[1] != H || call.o.shape[2] != V ||
      key.shape[3] != K || value.shape[2] != call.HKV || call.HKV < 1 || H % call.HKV ||
      (K > 1 && call.q.stride[2] != 1) || (V > 1 && call.o.stride[2] != 1))
    throw std::invalid_argument("q [R, H, K], keys, values and o [R, H, V] do not fit together");
  if (call.q.dtype == Dtype::float64 || call.o.dtype != call.q.dtype)
    throw std::invalid_argument("attention to cached keys takes float32 and bfloat16");
  for (const Entries* entries : {&keys, &values})
    for (const Array& array : entries->arrays)
      if (array.dtype != call.q.dtype || array.shape[2] != call.HKV || array.shape[3] != (entries == &keys ? K : V))
        throw std::invalid_argument("keys and values must have one shape and the dtype of q");
  call.form = {call.q.dtype, int(K), int(V), scale, window};
  if (sinks) {
    const Array array = array_of(*sinks);
    if (array.dtype != Dtype::float32 || array.dims != 1 || array.shape[0] != H || (H > 1 && array.stride[0] != 1))
      throw std::invalid_argument("sinks must be [H] in float32");
    call.sinks = reinterpret_cast<const float*>(array.data);
  }
  const int64_t count = int64_t(lengths.size());
  if (int64_t(edges.size()) != count + 1 || int64_t(held.size()) != count)
    throw std::invalid_argument("each sequence has edges, a length and a first key");
  std::vector<AttendSequence> sequences;
  for (int64_t n = 0; n < count; n++) {
    const int64_t begin = edges[size_t(n)], end = edges[size_t(n + 1)], S = lengths[size_t(n)], first = held[size_t(n)];
    if (begin < 0 || end < begin || end > call.q.shape[0] || end - begin > S || first < 0 || first > S)
      throw std::invalid_argument("a sequence has more queries than keys, or queries that there are not");
    // Of keys that come a block at a time, the tensors hold those from the first on.
    const int64_t offset = carried ? first : 0, there = carried ? std::min(S, first + key.shape[1]) : S;
    if (end > begin)
      sequences.push_back(
          {begin, end, S, first, there, keys.of(n, there, first, offset), values.of(n, there, first, offset)});
  }
  call.sequences = sequences.data(), call.count = int64_t(sequences.size());
  const AttendKernels& kernels = kernels_of(isa).attend;
  call.last = last;
  if (carried) {
    const Array array = array_of(*carried);
    const int64_t numbers = attend_carried(call.form, kernels);
    if (array.dtype != Dtype::float32 || array.dims != 3 || array.shape[0] != call.q.shape[0] || array.shape[1] != H ||
        array.shape[2] != numbers || array.stride[2] != 1 || array.stride[1] != numbers ||
        array.stride[0] != H * numbers)
      throw std::invalid_argument("what is carried must be [R, H, numbers] in float32");
    call.carried = reinterpret_cast<float*>(array.data);
  } else if (!last) {
    throw std::invalid_argument("without what is carried there is one call");
  }
  nb::gil_scoped_release release;
  attend(call, kernels, threads);
}

}  // namespace

void bind_attend(nb::module_& m) {
  m.def("attend", &run, "q"_a, "k"_a, "v"_a, "pages"_a.none(), "edges"_a, "lengths"_a, "held"_a, "scale"_a, "window"_a,
        "sinks"_a.none(), "o"_a, "carried"_a.none(), "last"_a, "isa"_a, "threads"_a);
  m.def(
      "attend_carried",
      [](const Tensor& q, int64_t V, const std::string& isa) {
        const AttendForm form{array_of(q).dtype, 1, int(V), 1, 0};
        return attend_carried(form, kernels_of(isa).attend);
      },
      "q"_a, "V"_a, "isa"_a);
}

}  // namespace intarsia
