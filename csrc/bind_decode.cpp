#include "bindings.h"
#include "decode.h"
#include "dispatch.h"

namespace intarsia {

namespace {

using Numbers = std::optional<nb::ndarray<const double, nb::device::cpu, nb::c_contig>>;

// The layer with its weights in one type.
template <class R>
class Layer {
 public:
  Layer(const DecodeLayer& form, const Numbers& rate, const Numbers& bias, const Numbers& conv, const Numbers& norm)
      : layer(form) {
    layer.rate = keep(rate), layer.bias = keep(bias), layer.conv_weight = keep(conv), layer.norm_weight = keep(norm);
  }
  DecodeLayer layer;

 private:
  const R* keep(const Numbers& given) {
    if (!given) return nullptr;
    std::vector<R>& copy = kept_.emplace_back(given->data(), given->data() + given->size());
    copy.resize(copy.size() + 64 / sizeof(R));  // room to read a whole vector behind the last number
    return copy.data();
  }
  std::vector<std::vector<R>> kept_;
};

struct DecodeStep {
  Layer<float> narrow;
  Layer<double> wide;
  bool fixed;  // all tokens share one decay of each head
  const DecodeKernels& kernels;
};

void construct(DecodeStep* self, int H, int HV, int K, int V, double scale, bool erases, bool normalize, bool general,
               int decay, bool fixed, int gate, double bound, double beta_scale, const Numbers& rate,
               const Numbers& bias, int W, bool silu, const Numbers& conv_weight, const Numbers& norm_weight,
               double norm_eps, int output_gate, const std::string& isa) {
  DecodeLayer form{};
  form.H = H, form.HV = HV, form.K = K, form.V = V;
  form.scale = scale, form.erases = erases, form.normalize = normalize, form.general = general;
  form.decay = Decay(decay), form.gate = Gate(gate), form.bound = bound, form.beta_scale = beta_scale;
  form.W = W, form.silu = silu, form.norm_eps = norm_eps, form.output_gate = OutputGate(output_gate);
  new (self) DecodeStep{{form, rate, bias, conv_weight, norm_weight},
                        {form, rate, bias, conv_weight, norm_weight},
                        fixed,
                        kernels_of(isa).decode};
}

// Whether a tensor can be read and is `shape` (where that is not -1) without gaps.
bool view(nb::handle tensor, std::initializer_list<int64_t> shape, Array& array) {
  if (!view_tensor(tensor, array) || array.dims != int(shape.size())) return false;
  int64_t stride = 1;
  bool dense = true;
  for (int d = array.dims - 1; d >= 0; d--) {
    const int64_t expected = shape.begin()[d];
    if (expected >= 0 && array.shape[d] != expected) return false;
    dense = dense && (array.shape[d] == 1 || array.stride[d] == stride);
    stride *= array.shape[d];
  }
  return dense || stride == 0;  // nothing has no gaps
}
// The same for one that is there if `wanted`, or may be (`optional`).
bool view_if(bool wanted, nb::handle tensor, std::initializer_list<int64_t> shape, Array& array,
             bool optional = false) {
  return tensor.is_none() ? !wanted || optional : wanted && view(tensor, shape, array);
}

Rows rows_of(const Array& array, int64_t numbers) { return {array.data, numbers * size_of(array.dtype), array.dtype}; }

// Runs the step if everything fits together, or returns false and has done nothing: then Python finds out what is wrong
// or can be helped. Without `board_to` the states are written where they are read. A step takes microseconds, as all
// these checks would in Python.
bool run(const DecodeStep& self, nb::handle qkv, nb::handle g, nb::handle beta, nb::handle z, nb::handle out,
         nb::handle board_from, nb::handle conv_from, nb::handle board_to, nb::handle conv_to, int64_t sequences,
         int64_t tokens, uintptr_t edges, uintptr_t read, uintptr_t write, int64_t highest_read, int64_t highest_write,
         bool contested, int threads, nb::handle a, nb::handle b) {
  const DecodeLayer& layer = self.narrow.layer;
  const int64_t HV = layer.HV, K = layer.K, V = layer.V, channels = layer.channels(), past = layer.W - 1;
  const int64_t decays = layer.decay == Decay::channel ? HV * K : HV;
  const bool convolves = layer.W > 0, decaying = layer.decay != Decay::none;
  Array x, decay, strength, gate, o, along, reads, board, conv, new_board, new_conv;
  if (!view(qkv, {tokens, channels}, x) || !view(out, {tokens, HV * V}, o) || o.dtype != x.dtype) return false;
  if (!(self.fixed ? view_if(true, g, {HV}, decay) : view_if(decaying, g, {tokens, decays}, decay)) ||
      !view_if(layer.erases, beta, {tokens, HV}, strength, true) ||
      !view_if(layer.output_gate != OutputGate::none, z, {tokens, HV * V}, gate) ||
      !view_if(layer.general, a, {tokens, HV * K}, along) || !view_if(layer.general, b, {tokens, HV * K}, reads))
    return false;
  if (!view(board_from, {-1, HV, K, V}, board) || !view_if(convolves, conv_from, {-1, past, channels}, conv))
    return false;
  if (board_to.is_none())
    new_board = board, new_conv = conv;
  else if (!view(board_to, {-1, HV, K, V}, new_board) || !view_if(convolves, conv_to, {-1, past, channels}, new_conv))
    return false;
  const bool wide = x.dtype == Dtype::float64;
  const Dtype number = wide ? Dtype::float64 : Dtype::float32;
  if (board.dtype != number || new_board.dtype != number) return false;
  if (convolves && (conv.dtype != number || new_conv.dtype != number || conv.shape[0] != board.shape[0] ||
                    new_conv.shape[0] != new_board.shape[0]))
    return false;
  if (highest_read >= board.shape[0] || highest_write >= new_board.shape[0]) return false;
  if (contested && board.data == new_board.data) return false;

  const auto slots = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  const DecodeCall call{rows_of(x, channels),
                        rows_of(decay, self.fixed ? 0 : decays),
                        rows_of(strength, HV),
                        rows_of(gate, HV * V),
                        rows_of(o, HV * V),
                        rows_of(along, HV * K),
                        rows_of(reads, HV * K),
                        sequences,
                        slots(edges),
                        slots(read),
                        slots(write),
                        {board.data, conv.data},
                        {new_board.data, new_conv.data}};
  nb::gil_scoped_release release;
  decode(wide ? self.wide.layer : layer, call, self.kernels, wide, threads);
  return true;
}

}  // namespace

void bind_decode(nb::module_& m) {
  nb::class_<DecodeStep>(m, "DecodeStep", "A layer's decode step. With copies of its weights.")
      .def("__init__", &construct, "H"_a, "HV"_a, "K"_a, "V"_a, "scale"_a, "erases"_a, "normalize"_a, "general"_a,
           "decay"_a, "fixed"_a, "gate"_a, "bound"_a, "beta_scale"_a, "rate"_a.none(), "bias"_a.none(), "W"_a, "silu"_a,
           "conv_weight"_a.none(), "norm_weight"_a.none(), "norm_eps"_a, "output_gate"_a, "isa"_a)
      .def("run", &run, "qkv"_a.none(), "g"_a.none(), "beta"_a.none(), "z"_a.none(), "out"_a.none(), "board"_a.none(),
           "conv"_a.none(), "board_to"_a.none(), "conv_to"_a.none(), "sequences"_a, "tokens"_a, "edges"_a, "read"_a,
           "write"_a, "highest_read"_a, "highest_write"_a, "contested"_a, "threads"_a, "a"_a.none() = nb::none(),
           "b"_a.none() = nb::none());
}

}  // namespace intarsia
