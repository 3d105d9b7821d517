// The Python module. Its functions release the interpreter's lock while they compute.
#include "bindings.h"

#include "dispatch.h"

NB_MODULE(_native, m) {
  m.doc() = "Intarsia's CPU kernels";
  m.def("available", &intarsia::available, "The instruction sets that this machine can run, the best first.");
  intarsia::bind_attend(m);
  intarsia::bind_conv(m);
  intarsia::bind_decode(m);
  intarsia::bind_few_rows(m);
  intarsia::bind_linear(m);
  intarsia::bind_norm(m);
  intarsia::bind_row_program(m);
  intarsia::bind_softmax(m);
}
