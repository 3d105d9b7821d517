// Times ggml's gated delta rule (GGML_OP_GATED_DELTA_NET, float32) on the CPU, for benchmarks/cpu.
//
//     ggml_delta_rule HEADS DIM TOKENS channel|head THREADS INPUTS OUTPUT
//
// INPUTS holds float32 numbers without a header, one tensor after another, tokens first: q, k, v [T, H, D],
// the log-decay g [T, H, D] or [T, H], and beta [T, H]. The program runs the operator once from a zero state,
// writes o [T, H, D] to OUTPUT and prints "ready". Then it answers each line "run" on its standard input with
// the seconds one run took, until the input ends. README.md beside this file says how to build it.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cout << message << std::endl;
  std::exit(1);
}

template <typename T, void (*release)(T*)>
struct Release {
  void operator()(T* pointer) const { release(pointer); }
};
template <typename T, void (*release)(T*)>
using Owned = std::unique_ptr<T, Release<T, release>>;

void read_into(ggml_tensor* tensor, std::ifstream& file) {
  std::vector<char> bytes(ggml_nbytes(tensor));
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) fail("the inputs are too short");
  ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
}

void write_values(const ggml_tensor* tensor, size_t bytes, const char* path) {
  std::vector<char> values(bytes);
  ggml_backend_tensor_get(tensor, values.data(), 0, bytes);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(values.data(), static_cast<std::streamsize>(bytes))) fail(std::string("cannot write ") + path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) fail("usage: ggml_delta_rule HEADS DIM TOKENS channel|head THREADS INPUTS OUTPUT");
  const int64_t heads = std::atoll(argv[1]), dim = std::atoll(argv[2]), tokens = std::atoll(argv[3]);
  const std::string decay = argv[4];
  if (heads < 1 || dim < 1 || tokens < 1) fail("heads, dim and tokens must be positive");
  if (decay != "channel" && decay != "head") fail("the decay is channel or head");

  Owned<ggml_backend, ggml_backend_free> backend(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(backend.get(), std::atoi(argv[5]));
  Owned<ggml_context, ggml_free> context(
      ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true}));
  const auto tensor = [&](int64_t a, int64_t b, int64_t c) {
    return ggml_new_tensor_4d(context.get(), GGML_TYPE_F32, a, b, c, 1);
  };
  ggml_tensor* q = tensor(dim, heads, tokens);
  ggml_tensor* k = tensor(dim, heads, tokens);
  ggml_tensor* v = tensor(dim, heads, tokens);
  ggml_tensor* g = tensor(decay == "channel" ? dim : 1, heads, tokens);
  ggml_tensor* beta = tensor(1, heads, tokens);
  ggml_tensor* state = tensor(dim, dim, heads);
  // One snapshot of the state: the last. The output is o, followed by it.
  ggml_tensor* out = ggml_gated_delta_net(context.get(), q, k, v, g, beta, state, 1);
  ggml_cgraph* graph = ggml_new_graph(context.get());
  ggml_build_forward_expand(graph, out);
  Owned<ggml_backend_buffer, ggml_backend_buffer_free> buffer(
      ggml_backend_alloc_ctx_tensors(context.get(), backend.get()));
  if (!buffer) fail("not enough memory");

  std::ifstream inputs(argv[6], std::ios::binary);
  if (!inputs) fail(std::string("cannot read ") + argv[6]);
  for (ggml_tensor* input : {q, k, v, g, beta}) read_into(input, inputs);
  ggml_backend_tensor_memset(state, 0, 0, ggml_nbytes(state));

  const auto run = [&] {
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) fail("ggml could not run it");
  };
  run();
  write_values(out, ggml_nbytes(v), argv[7]);
  std::cout << "ready" << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    std::printf("%.9f\n", passed.count());
    std::fflush(stdout);
  }
  return 0;
}
