#include "gathered.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

namespace intarsia {

namespace {

// Rows of numbers that a thread works on in turn, and of which a task has so many.
constexpr int64_t QUERIES = 32;
// So many parts of the queries of a sequence add up gradients of keys by themselves, or as many as this much room has.
constexpr int64_t PARTS = 16, ROOM = int64_t(1) << 26;

float widened(const char* from, Dtype dtype) {
  if (dtype == Dtype::float32) {
    float x;
    std::memcpy(&x, from, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void read(const char* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  if (dtype == Dtype::float32)
    std::memcpy(to, from, size_t(count) * 4);
  else
    for (int64_t i = 0; i < count; i++) to[i] = widened(from + 2 * i, dtype);
  std::fill(to + count, to + padded, 0.0f);
}

void write(const float* from, int64_t count, char* to, Dtype dtype) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, size_t(count) * 4);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint16_t half = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t((bits >> 16) | 0x40) : uint16_t(rounded);
    std::memcpy(to + 2 * i, &half, 2);
  }
}

class Gathered {
 public:
  Gathered(const GatheredCall& call, const GatheredKernels& kernels, int threads)
      : call(call),
        kernels(kernels),
        threads(threads),
        H(call.q.shape[1]),
        HKV(call.k.shape[1]),
        K(call.q.shape[2]),
        V(call.v.shape[2]),
        readers(std::max(HKV, call.groups)),
        each(H / readers),
        rows(kernels.rows(each)),
        wide_K(kernels.padded(K)),
        wide_V(kernels.padded(V)) {}

  void forward() {
    of_each_head([&](int64_t head, int64_t begin, int64_t end) {
      const int64_t tasks = (end - begin + QUERIES - 1) / QUERIES;
      parallel(tasks, threads, 0, [&](int64_t i, char*) {
        Room& room = of_thread(end - begin);
        for (int64_t t = begin + i * QUERIES; t < std::min(end, begin + (i + 1) * QUERIES); t++)
          for_readers(head, begin, t, room, [&](const GatheredQuery& query, int64_t first) {
            if (query.count) kernels.forward(query, room.o.data(), room.log_sum.data(), room.scratch.data());
            for (int64_t h = 0; h < each; h++) {
              float* o = room.o.data() + h * wide_V;
              if (!query.count) std::fill(o, o + V, 0.0f);
              write(o, V, call.o.at(t, first + h), call.o.dtype);
              call.log_sum[t * H + first + h] =
                  query.count ? room.log_sum[size_t(h)] : -std::numeric_limits<float>::infinity();
            }
          });
      });
    });
  }

  void backward(const Array& d_q, const Array& d_k, const Array& d_v) {
    of_each_head([&](int64_t head, int64_t begin, int64_t end) {
      const int64_t S = end - begin, numbers = S * (wide_K + wide_V);
      const int64_t parts = std::min({PARTS, std::max<int64_t>(1, ROOM / numbers), (S + QUERIES - 1) / QUERIES});
      std::vector<float> sums(size_t(parts * numbers), 0.0f);
      // Queries take turns, so that every part has early and late ones.
      parallel(parts, threads, 0, [&](int64_t part, char*) {
        Room& room = of_thread(S);
        float* of_keys = sums.data() + part * numbers;
        float* of_values = of_keys + S * wide_K;
        for (int64_t t = begin + part; t < end; t += parts)
          for_readers(head, begin, t, room, [&](const GatheredQuery& query, int64_t first) {
            for (int64_t h = 0; h < each; h++) {
              read(call.o.at(t, first + h), call.o.dtype, V, wide_V, room.o.data() + h * wide_V);
              room.log_sum[size_t(h)] = call.log_sum[t * H + first + h];
            }
            if (query.count)
              kernels.backward(query, room.o.data(), room.log_sum.data(), room.d_q.data(), of_keys, of_values,
                               room.scratch.data());
            else
              std::fill(room.d_q.begin(), room.d_q.end(), 0.0f);
            for (int64_t h = 0; h < each; h++) write(room.d_q.data() + h * wide_K, K, d_q.at(t, first + h), d_q.dtype);
          });
      });
      constexpr int64_t TOKENS = 64;
      parallel((S + TOKENS - 1) / TOKENS, threads, 0, [&](int64_t i, char*) {
        for (int64_t s = i * TOKENS; s < std::min(S, (i + 1) * TOKENS); s++) {
          gather(sums.data() + s * wide_K, numbers, parts, K, d_k.at(begin + s, head), d_k.dtype);
          gather(sums.data() + S * wide_K + s * wide_V, numbers, parts, V, d_v.at(begin + s, head), d_v.dtype);
        }
      });
    });
  }

 private:
  struct Room {
    std::vector<float> q, o, d_q, log_sum, scratch;
    std::vector<int32_t> tokens;
  };

  const GatheredCall& call;
  const GatheredKernels& kernels;
  int threads;
  int64_t H, HKV, K, V, readers, each;
  int rows;
  int64_t wide_K, wide_V;
  std::vector<float> keys, values;  // of one head of one sequence

  Room& of_thread(int64_t S) const {
    static thread_local Room room;
    const int64_t most = std::min(S, call.slots * call.block);
    room.q.assign(size_t(rows * wide_K), 0.0f), room.o.assign(size_t(rows * wide_V), 0.0f);
    room.d_q.assign(size_t(rows * wide_K), 0.0f), room.log_sum.assign(size_t(rows), 0.0f);
    room.scratch.resize(size_t(kernels.scratch(rows, most)) + 16);
    return room;
  }

  // The keys and values of each head of each sequence in float32, and then `work(head, begin, end)`.
  template <class Work>
  void of_each_head(const Work& work) {
    for (int64_t n = 0; n < call.count; n++) {
      const int64_t begin = call.edges[n], end = call.edges[n + 1], S = end - begin;
      if (!S) continue;
      keys.resize(size_t(S * wide_K)), values.resize(size_t(S * wide_V));
      for (int64_t head = 0; head < HKV; head++) {
        constexpr int64_t TOKENS = 256;
        parallel((S + TOKENS - 1) / TOKENS, threads, 0, [&](int64_t i, char*) {
          for (int64_t s = i * TOKENS; s < std::min(S, (i + 1) * TOKENS); s++) {
            read(call.k.at(begin + s, head), call.k.dtype, K, wide_K, keys.data() + s * wide_K);
            read(call.v.at(begin + s, head), call.v.dtype, V, wide_V, values.data() + s * wide_V);
          }
        });
        work(head, begin, end);
      }
    }
  }

  // `work(query, its first head)` for those that read a key head.
  template <class Work>
  void for_readers(int64_t head, int64_t begin, int64_t t, Room& room, const Work& work) const {
    const int64_t shared = readers / HKV;
    for (int64_t reader = head * shared; reader < (head + 1) * shared; reader++) {
      const int64_t first = reader * each, group = reader * call.groups / readers;
      const int32_t* picked = call.picked + (t * call.groups + group) * call.slots;
      room.tokens.clear();
      for (int64_t i = 0; i < call.slots; i++)
        if (picked[i] >= 0)
          for (int64_t j = 0; j < call.block; j++)
            if (picked[i] * call.block + j <= t - begin) room.tokens.push_back(int32_t(picked[i] * call.block + j));
      for (int64_t h = 0; h < each; h++)
        read(call.q.at(t, first + h), call.q.dtype, K, wide_K, room.q.data() + h * wide_K);
      work({rows, int(wide_K), int(wide_V), int64_t(room.tokens.size()), room.tokens.data(), call.scale, room.q.data(),
            keys.data(), values.data()},
           first);
    }
  }

  static void gather(float* sums, int64_t apart, int64_t parts, int64_t count, char* to, Dtype dtype) {
    for (int64_t part = 1; part < parts; part++)
      for (int64_t i = 0; i < count; i++) sums[i] += sums[part * apart + i];
    write(sums, count, to, dtype);
  }
};

}  // namespace

void gathered_forward(const GatheredCall& call, const GatheredKernels& kernels, int threads) {
  Gathered(call, kernels, threads).forward();
}

void gathered_backward(const GatheredCall& call, const Array& d_q, const Array& d_k, const Array& d_v,
                       const GatheredKernels& kernels, int threads) {
  Gathered(call, kernels, threads).backward(d_q, d_k, d_v);
}

}  // namespace intarsia
