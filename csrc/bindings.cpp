// The Python module. Its functions release the interpreter's lock while they compute.
#include "bindings.h"

#include "crowd.h"
#include "dispatch.h"

NB_MODULE(_native, m) {
  m.doc() = "Intarsia's CPU kernels";
  m.def("available", &intarsia::available, "The instruction sets that this machine can run, the best first.");
  m.def("maker", &intarsia::maker, "Who made this processor, as it says itself, or nothing.");
  nb::class_<intarsia::Crowd>(m, "Crowd", "How many threads share work on a busy machine. Times are nanoseconds.")
      .def(nb::init<>())
      .def("allowed", &intarsia::Crowd::allowed, "threads"_a, "now"_a)
      .def("saw", &intarsia::Crowd::saw, "threads"_a, "begin"_a, "end"_a, "ran"_a);
  intarsia::bind_attend(m);
  intarsia::bind_conv(m);
  intarsia::bind_decode(m);
  intarsia::bind_few_rows(m);
  intarsia::bind_gathered(m);
  intarsia::bind_linear(m);
  intarsia::bind_norm(m);
  intarsia::bind_pick(m);
  intarsia::bind_row_program(m);
  intarsia::bind_softmax(m);
  intarsia::bind_swiglu(m);
}
