#include "decode.h"

#include <algorithm>

#include "parallel.h"

namespace intarsia {

namespace {

// How many numbers of boards a thread should have at least: on fewer, waking it costs more than it brings.
constexpr int64_t NUMBERS_OF_THREAD = 20000;

// How many key heads of a sequence make a task, where sequences bring one token each: as many as can be, if that leaves
// every thread the same share or many tasks. More tokens of a head are better worked on side by side than more heads.
int heads_of_task(const DecodeLayer& layer, const DecodeCall& call, int threads) {
  const int64_t tokens = call.edges[call.sequences], all = tokens * layer.H;
  const auto shares_out = [&](int heads) {
    const int64_t round = int64_t(heads) * threads;
    return layer.H % heads == 0 && (all % round == 0 || all >= 8 * round);
  };
  int heads = tokens > call.sequences ? 1 : std::min(layer.H, DECODE_ROWS);
  while (heads > 1 && !shares_out(heads)) heads--;
  return heads;
}

char* slot_of(char* pool, int64_t slot, int64_t bytes) { return pool && slot >= 0 ? pool + slot * bytes : nullptr; }

}  // namespace

void decode(const DecodeLayer& layer, const DecodeCall& call, const DecodeKernels& kernels, bool wide, int threads) {
  const int64_t number = wide ? 8 : 4, head_board = int64_t(layer.K) * layer.V * number;
  const int64_t board = layer.HV * head_board, conv = int64_t(layer.channels()) * std::max(layer.W - 1, 0) * number;
  const int64_t tokens = call.edges[call.sequences], numbers = tokens * layer.HV * layer.K * layer.V;
  const int useful = int(std::clamp<int64_t>(numbers / NUMBERS_OF_THREAD, 1, threads));
  const int heads = heads_of_task(layer, call, useful);
  const int64_t tasks_each = layer.H / heads;
  parallel_shares(call.sequences * tasks_each, useful, kernels.scratch(layer, wide), [&](int64_t i, char* scratch) {
    const int64_t n = i / tasks_each, first = call.edges[n];
    DecodeTask task;
    task.head = int(i % tasks_each) * heads;
    task.heads = heads;
    task.tokens = call.edges[n + 1] - first;
    task.x = call.x.rows_from(first), task.g = call.g.rows_from(first), task.beta = call.beta.rows_from(first);
    task.z = call.z.rows_from(first), task.o = call.o.rows_from(first);
    task.a = call.a.rows_from(first), task.b = call.b.rows_from(first);
    task.board_from = slot_of(call.from.board, call.read[n], board);
    task.conv_from = slot_of(call.from.conv, call.read[n], conv);
    task.board_to = slot_of(call.to.board, call.write[n], board);
    task.conv_to = slot_of(call.to.conv, call.write[n], conv);
    kernels.step(layer, task, wide, scratch);
  });
}

}  // namespace intarsia
