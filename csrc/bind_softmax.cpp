#include "bindings.h"
#include "dispatch.h"
#include "softmax.h"

namespace intarsia {

namespace {

using Targets = nb::ndarray<const int64_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

}  // namespace

void bind_softmax(nb::module_& m) {
  m.def(
      "log_sums",
      [](const Tensor& logits, const Tensor& log_sum, const std::string& isa, int threads) {
        const Array from = array_of(logits), to = array_of(log_sum);
        const SoftmaxKernels& kernels = kernels_of(isa).softmax;
        nb::gil_scoped_release release;
        log_sums(from, to, kernels, threads);
      },
      "logits"_a, "log_sum"_a, "isa"_a, "threads"_a);

  m.def(
      "softmax_gradients",
      [](const Tensor& logits, const Tensor& log_sum, const Targets& targets, const Tensor& gradient,
         const Tensor& d_logits, const std::string& isa, int threads) {
        const Array from = array_of(logits), sums = array_of(log_sum), given = array_of(gradient),
                    to = array_of(d_logits);
        const SoftmaxKernels& kernels = kernels_of(isa).softmax;
        nb::gil_scoped_release release;
        softmax_gradients(from, sums, targets.data(), given, to, kernels, threads);
      },
      "logits"_a, "log_sum"_a, "targets"_a, "gradient"_a, "d_logits"_a, "isa"_a, "threads"_a);
}

}  // namespace intarsia
