#include "pick.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"

namespace intarsia {

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Of two places the earlier is more.
uint32_t turned(uint32_t i) { return ~i; }

// A number that compares as the value does, and of equal values as the places: no two entries have the same.
uint64_t rank_of(float value, int64_t i) {
  value += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | turned(uint32_t(i));
}

int64_t number_of(uint64_t rank) { return turned(uint32_t(rank)); }

// Keeps the `count` best of what it was given.
class Best {
 public:
  void choose(const float* values, int64_t n, int64_t count, const PickKernels& kernels, std::vector<int32_t>& chosen) {
    chosen.clear();
    if (n <= count) {
      for (int64_t i = 0; i < n; i++) chosen.push_back(int32_t(i));
      return;
    }
    const int64_t room = std::max<int64_t>(2 * count, 64);
    ranks.clear();
    int64_t i = 0;
    for (; i < std::min(n, room); i++) ranks.push_back(rank_of(values[i], i));
    while (i < n) {
      shrink(count);
      // What comes later must be more than the least of these: where it is equal, it is too late.
      const float least = values[number_of(ranks[size_t(count - 1)])];
      while (i < n && int64_t(ranks.size()) < room) {
        i = kernels.next_above(values, i, n, least);
        if (i < n) ranks.push_back(rank_of(values[i], i)), i++;
      }
    }
    shrink(count);
    for (uint64_t rank : ranks) chosen.push_back(int32_t(number_of(rank)));
    std::sort(chosen.begin(), chosen.end());
  }

 private:
  std::vector<uint64_t> ranks;

  // The best `count`, the least of them last.
  void shrink(int64_t count) {
    if (int64_t(ranks.size()) < count) return;
    std::nth_element(ranks.begin(), ranks.begin() + count - 1, ranks.end(), std::greater<uint64_t>());
    ranks.resize(size_t(count));
  }
};

struct Room {
  std::vector<float> scores, scratch, values;
  std::vector<int32_t> chosen;
  Best best;
};

void pick_row(const PickCall& call, const PickKernels& kernels, int64_t t, int64_t group) {
  static thread_local Room room;
  const PickForm& form = call.form;
  const int count = form.heads / form.groups;
  const int64_t place = call.place + t, begin = form.wide - 1, end = std::max((place + 1) / call.stride, begin);
  const int64_t own = place / call.block, blocks = call.tail ? end : own + 1;
  if (int64_t(room.scores.size()) < end) room.scores.resize(size_t(end)), room.scratch.resize(size_t(end));
  if (int64_t(room.values.size()) < blocks) room.values.resize(size_t(blocks));
  const int64_t H = form.heads, head = group * count;
  const float* products = reinterpret_cast<const float*>(call.products.at(t, head));
  const float* weights = call.weights ? call.weights + t * H + head : nullptr;
  kernels.scores(form, products, call.products.stride[1], weights, count, begin, end, room.scores.data(),
                 room.scratch.data());
  const float* values = room.scores.data();
  if (form.size > 1 || form.wide > 1 || blocks > end) {
    kernels.values(form, room.scores.data(), begin, end, blocks, room.values.data());
    values = room.values.data();
  }
  if (!call.tail && (call.first || call.last)) {
    // Above all scores, which are no more than `largest`.
    float* changed = const_cast<float*>(values);
    const float above = std::numeric_limits<float>::infinity();
    for (int64_t b = 0; b < std::min(call.first, blocks); b++) changed[b] = above;
    for (int64_t b = std::max<int64_t>(own - call.last + 1, 0); b < blocks; b++) changed[b] = above;
  }
  room.best.choose(values, blocks, call.count, kernels, room.chosen);
  int32_t* out = call.out + (t * form.groups + group) * call.slots;
  int64_t n = 0;
  for (int32_t b : room.chosen)
    if (call.tail || values[b] > NOTHING) out[n++] = b;
  if (call.tail && (place + 1) % call.block) out[n++] = int32_t(own);
  for (; n < call.slots; n++) out[n] = -1;
}

}  // namespace

void pick_products(const PickProducts& call, const PickKernels& kernels, int threads) {
  const int64_t T = call.q.shape[0], H = call.q.shape[1], K = call.q.shape[2], each = H / call.heads;
  const int64_t beside = kernels.beside(), rows = (each + beside - 1) / beside * beside, padded = kernels.padded(K);
  // Rows of queries that share a key head, padded with rows and columns of zeros.
  std::vector<float> q(size_t(T * call.heads * rows * padded), 0.0f);
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < H; h++) {
      const float* from = reinterpret_cast<const float*>(call.q.at(t, h));
      std::copy(from, from + K, q.begin() + ((t * call.heads + h / each) * rows + h % each) * padded);
    }
  constexpr int64_t SOME = 4 * PICK_KEYS;
  const int64_t tasks = (call.count + SOME - 1) / SOME;
  const int useful = int(std::min<int64_t>(threads, std::max<int64_t>(1, tasks / 4)));
  parallel_shares(tasks, useful, 0, [&](int64_t i, char*) {
    const int64_t end = std::min(call.count, (i + 1) * SOME);
    for (int64_t first = i * SOME; first < end; first += PICK_KEYS) {
      const int there = int(std::min<int64_t>(PICK_KEYS, end - first));
      const char* keys[PICK_KEYS];
      for (int j = 0; j < there; j++) keys[j] = call.keys.at(first + j);
      for (int64_t t = 0; t < T; t++)
        kernels.products({H, call.heads, K, padded, q.data() + t * call.heads * rows * padded}, keys, there,
                         call.keys.head_bytes, call.dtype, reinterpret_cast<float*>(call.products.at(t)) + first,
                         call.products.stride[1]);
    }
  });
}

void pick(const PickCall& call, const PickKernels& kernels, int threads) {
  const int64_t T = call.products.shape[0], G = call.form.groups, rows = T * G;
  const int64_t numbers = call.products.shape[1] * call.products.shape[2] / G;
  const int useful = numbers * rows < (1 << 15) ? 1 : threads;
  parallel(rows, useful, 0, [&](int64_t i, char*) { pick_row(call, kernels, i / G, i % G); });
}

}  // namespace intarsia
