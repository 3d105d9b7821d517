#include "conv.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace intarsia {

namespace {

// Tokens `first .. last - 1` of sequence n, which begins at token `start` of its row of the batch.
struct Piece {
  int64_t n, row, start, first, last, tokens;
};
// Pieces that one task works on, in this order: a long sequence is cut into several pieces, short ones are put together
// so that each task has about CONV_TOKENS tokens. It depends on the lengths alone.
using Batch = std::vector<Piece>;

std::vector<Batch> batches_of(const ConvCall& call) {
  std::vector<Batch> batches(1);
  int64_t in_last = 0;
  const int64_t count = call.edges.empty() ? call.x.shape[0] : int64_t(call.edges.size()) - 1;
  for (int64_t n = 0; n < count; n++) {
    const int64_t start = call.edges.empty() ? 0 : call.edges[n];
    const int64_t tokens = call.edges.empty() ? call.x.shape[1] : call.edges[n + 1] - start;
    for (int64_t first = 0; first < tokens; first += CONV_TOKENS) {
      if (in_last >= CONV_TOKENS) {
        batches.emplace_back();
        in_last = 0;
      }
      const int64_t last = std::min(first + CONV_TOKENS, tokens);
      batches.back().push_back({n, call.edges.empty() ? n : 0, start, first, last, tokens});
      in_last += last - first;
    }
  }
  return batches;
}

int64_t blocks_of(const ConvCall& call) { return (call.x.shape[2] + CONV_CHANNELS - 1) / CONV_CHANNELS; }

ConvBlock block_of(const ConvCall& call, int64_t channel) {
  const int64_t channels = std::min<int64_t>(CONV_CHANNELS, call.x.shape[2] - channel);
  return {{call.weight.at(channel), 0, call.weight.dtype}, int(channels), int(call.weight.shape[1]), call.silu};
}

Rows rows_of(const Array& x, const Piece& piece, int64_t channel) {
  if (!x) return {};
  return {x.at(piece.row, piece.start, channel), x.stride[1] * size_of(x.dtype), x.dtype};
}
// The state of the piece's sequence, which is in the slot of its number or in that which `slots` say.
Rows state_of(const Array& x, const std::vector<int64_t>& slots, const Piece& piece, int64_t channel) {
  if (!x) return {};
  const int64_t slot = slots.empty() ? piece.n : slots[size_t(piece.n)];
  return {x.at(slot, 0, channel), x.stride[1] * size_of(x.dtype), x.dtype};
}

// The pieces of a batch in one block of channels; `fill` sets what one of the passes alone needs.
template <class Fill>
std::vector<ConvRun> runs_of(const ConvCall& call, const Batch& batch, int64_t channel, const Fill& fill) {
  std::vector<ConvRun> runs;
  for (const Piece& piece : batch) {
    ConvRun& run = runs.emplace_back();
    run.first = piece.first, run.last = piece.last, run.tokens = piece.tokens;
    run.x = rows_of(call.x, piece, channel), run.initial = state_of(call.initial, call.read, piece, channel);
    fill(run, piece);
  }
  return runs;
}

// On few numbers a second thread costs more than it brings.
int useful_threads(const ConvCall& call, int threads) {
  const int64_t numbers = call.x.shape[0] * call.x.shape[1] * call.x.shape[2];
  return int(std::min<int64_t>(threads, 1 + numbers / 32768));
}

bool is_wide(const ConvCall& call) { return call.x.dtype == Dtype::float64; }

// A packed sequence without tokens has no piece: the last of its inputs are those that came before, so its state, or
// the gradient of it, is what is given on the other side. States lie without gaps and are of one dtype.
void pass_empty(const ConvCall& call, const Array& given, const Array& taken) {
  if (!taken) return;
  const size_t bytes = size_t(call.x.shape[2] * (call.weight.shape[1] - 1) * size_of(taken.dtype));
  for (size_t n = 0; n + 1 < call.edges.size(); n++)
    if (call.edges[n] == call.edges[n + 1])
      given ? std::memcpy(taken.at(n), given.at(n), bytes) : std::memset(taken.at(n), 0, bytes);
}

}  // namespace

void conv_forward(const ConvCall& call, const Array& y, const Array& final, const ConvKernels& kernels, int threads) {
  const bool wide = is_wide(call);
  const std::vector<Batch> batches = batches_of(call);
  const int64_t blocks = blocks_of(call);
  // Blocks side by side follow each other, as they do in memory.
  parallel(int64_t(batches.size()) * blocks, useful_threads(call, threads), kernels.scratch(block_of(call, 0), wide),
           [&](int64_t i, char* scratch) {
             const int64_t channel = i % blocks * CONV_CHANNELS;
             const auto runs =
                 runs_of(call, batches[size_t(i / blocks)], channel, [&](ConvRun& run, const Piece& piece) {
                   run.y = rows_of(y, piece, channel), run.final = state_of(final, call.write, piece, channel);
                 });
             kernels.forward(block_of(call, channel), runs.data(), int64_t(runs.size()), wide, scratch);
           });
  pass_empty(call, call.initial, final);
}

void conv_backward(const ConvCall& call, const ConvGradientArrays& grads, const ConvKernels& kernels, int threads) {
  const bool wide = is_wide(call);
  const std::vector<Batch> batches = batches_of(call);
  const int64_t blocks = blocks_of(call), width = call.weight.shape[1] * CONV_CHANNELS;
  const int64_t bytes = width * (wide ? 8 : 4), scratch_bytes = kernels.scratch(block_of(call, 0), wide);
  threads = useful_threads(call, threads);
  // The gradient of the weights, of each batch and block.
  const std::unique_ptr<char[]> sums(new char[size_t(int64_t(batches.size()) * blocks * bytes)]);
  parallel(int64_t(batches.size()) * blocks, threads, scratch_bytes, [&](int64_t i, char* scratch) {
    const int64_t channel = i % blocks * CONV_CHANNELS;
    const auto runs = runs_of(call, batches[size_t(i / blocks)], channel, [&](ConvRun& run, const Piece& piece) {
      run.d_y = rows_of(grads.d_y, piece, channel), run.d_final = state_of(grads.d_final, {}, piece, channel);
      run.d_x = rows_of(grads.x, piece, channel), run.d_initial = state_of(grads.initial, {}, piece, channel);
    });
    kernels.backward(block_of(call, channel), runs.data(), int64_t(runs.size()), sums.get() + i * bytes, wide, scratch);
  });
  parallel(blocks, threads, scratch_bytes, [&](int64_t i, char* scratch) {
    const int64_t channel = i * CONV_CHANNELS;
    kernels.add_weights(block_of(call, channel), sums.get() + i * bytes, int64_t(batches.size()), blocks * width,
                        {grads.weight.at(channel), 0, grads.weight.dtype}, wide, scratch);
  });
  pass_empty(call, grads.d_final, grads.initial);
}

}  // namespace intarsia
