#include "attend.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "parallel.h"

namespace intarsia {

namespace {

// Some rows of a sequence's queries, with each key head: row i is of token `token + i / group`, head
// `head * group + i % group`.
struct Part {
  const AttendSequence* sequence;
  int64_t first, count;             // rows of the sequence and of a key head
  int64_t first_chunk, last_chunk;  // that they see
};

// Where the entries of a block of keys are.
struct Block {
  int64_t first = 0;
  int count = 0;
  const char *k[ATTEND_BLOCK], *v[ATTEND_BLOCK];

  AttendKeys of(const AttendSequence& s, int64_t head) const {
    return {first, count, k, v, head * s.k.head_bytes, head * s.v.head_bytes};
  }
};

// Memory that a thread keeps for its next call: fresh one would be paid for in page faults.
char* kept(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

// The room for what chunks give, all together: more chunks wait until those are added up.
constexpr int64_t ROOM = 4 << 20;

// So few numbers are added up sooner than another thread is asked.
constexpr int64_t MERGED_ALONE = 1 << 17;

class Attend {
 public:
  Attend(const AttendCall& call, const AttendKernels& kernels, int threads)
      : call(call),
        kernels(kernels),
        threads(threads),
        group(call.q.shape[1] / call.HKV),
        q_bytes(kernels.prepared(call.form)),
        width(kernels.padded(call.form)),
        scratch_bytes((kernels.scratch(call.form) + 63) / 64 * 64) {}

  void run() {
    divide();
    // Few rows of a head are limited by the reading of keys, so a thread takes a chunk of keys with all heads, as they
    // lie in memory. So do parts that are too few for the threads. Else a thread does all of a part and a head.
    const bool few = most_rows < ATTEND_ROWS / 4 || int64_t(parts.size()) * call.HKV < 4 * threads;
    if (few)
      by_chunks();
    else
      by_heads();
  }

 private:
  const AttendCall& call;
  const AttendKernels& kernels;
  int threads;
  int64_t group, q_bytes, width, scratch_bytes, most_rows = 0;
  std::vector<Part> parts;

  void divide() {
    for (int64_t n = 0; n < call.count; n++) {
      const AttendSequence& s = call.sequences[n];
      const int64_t rows = (s.end - s.begin) * group;
      for (int64_t first = 0; first < rows; first += ATTEND_ROWS) {
        const int64_t count = std::min<int64_t>(ATTEND_ROWS, rows - first);
        const int64_t from = position(s, first), to = std::min(position(s, first + count - 1), s.last - 1);
        const int64_t seen = call.form.window ? std::max<int64_t>(0, from - call.form.window + 1) : 0;
        parts.push_back(
            {&s, first, count, std::max(seen, s.held) / ATTEND_CHUNK, to < s.held ? -1 : to / ATTEND_CHUNK});
        most_rows = std::max(most_rows, count);
      }
    }
  }

  int64_t position(const AttendSequence& s, int64_t row) const { return s.keys - (s.end - s.begin) + row / group; }

  // Room for rows of one part and head: what they have; and their queries.
  int64_t room() const { return (most_rows * (width + 2) * 4 + 63) / 64 * 64; }
  int64_t prepared_room() const { return (most_rows * (q_bytes + 8) + 63) / 64 * 64; }

  AttendRows rows_in(char* memory, const char* prepared, const Part& part) const {
    float* numbers = reinterpret_cast<float*>(memory);
    return {int(part.count),
            prepared,
            reinterpret_cast<const int64_t*>(prepared + most_rows * q_bytes),
            numbers + most_rows * width,
            numbers + most_rows * (width + 1),
            numbers};
  }

  AttendRows one_of(const AttendRows& rows, int64_t i) const {
    return {1, rows.q + i * q_bytes, rows.positions + i, rows.most + i, rows.total + i, rows.sums + i * width};
  }

  void prepare(const Part& part, int64_t head, char* to) const {
    const AttendSequence& s = *part.sequence;
    int64_t* positions = reinterpret_cast<int64_t*>(to + most_rows * q_bytes);
    for (int64_t i = 0; i < part.count; i++) {
      const int64_t row = part.first + i;
      positions[i] = position(s, row);
      const Rows q{call.q.at(s.begin + row / group, head * group + row % group), 0, call.q.dtype};
      kernels.prepare(call.form, q, 0, to + i * q_bytes);
    }
  }

  // Block `number` of a chunk, as far as the part sees it.
  Block block(const Part& part, int64_t chunk, int number) const {
    const AttendSequence& s = *part.sequence;
    Block found;
    const int64_t begin = chunk * ATTEND_CHUNK + number * ATTEND_BLOCK;
    // Behind a window nothing is seen of what is not held, and any address does. Without one it is left out.
    found.first = call.form.window ? begin : std::max(begin, s.held);
    const int64_t end = std::min({position(s, part.first + part.count - 1) + 1, s.last, begin + ATTEND_BLOCK});
    found.count = int(std::max<int64_t>(end - found.first, 0));
    for (int i = 0; i < found.count; i++) {
      const int64_t entry = std::max(found.first + i, s.held);
      found.k[i] = s.k.at(entry), found.v[i] = s.v.at(entry);
    }
    return found;
  }

  // Calls `work(block, next)` for the blocks of a chunk of which the part sees something; `next` is what follows, in
  // this chunk or the one behind it.
  template <class Work>
  void blocks(const Part& part, int64_t chunk, const Work& work) const {
    constexpr int COUNT = ATTEND_CHUNK / ATTEND_BLOCK;
    const int64_t held = call.form.window ? 0 : part.sequence->held - chunk * ATTEND_CHUNK;
    const int begin = int(std::clamp<int64_t>(held / ATTEND_BLOCK, 0, COUNT - 1));
    Block two[2];
    two[begin % 2] = block(part, chunk, begin);
    for (int number = begin; number < COUNT && two[number % 2].count; number++) {
      Block& next = two[(number + 1) % 2];
      next = number + 1 < COUNT ? block(part, chunk, number + 1) : block(part, chunk + 1, 0);
      work(two[number % 2], next);
    }
  }

  // What rows have of earlier keys.
  void begin(const Part& part, int64_t head, const AttendRows& rows) const {
    kernels.clear(call.form, rows);
    if (!call.carried) return;
    for (int i = 0; i < part.count; i++) {
      const float* from = carried(part, head, i);
      std::copy(from, from + width, rows.sums + i * width);
      rows.most[i] = from[width], rows.total[i] = from[width + 1];
    }
  }

  void end(const Part& part, int64_t head, const AttendRows& rows) const {
    const AttendSequence& s = *part.sequence;
    for (int i = 0; i < part.count; i++) {
      if (!call.last) {
        float* to = carried(part, head, i);
        std::copy(rows.sums + i * width, rows.sums + (i + 1) * width, to);
        to[width] = rows.most[i], to[width + 1] = rows.total[i];
        continue;
      }
      const int64_t row = part.first + i, h = head * group + row % group;
      const Rows o{call.o.at(s.begin + row / group, h), 0, call.o.dtype};
      const double sink = call.sinks ? double(call.sinks[h]) : -std::numeric_limits<double>::infinity();
      kernels.finish(call.form, rows, i, sink, o, 0);
    }
  }

  float* carried(const Part& part, int64_t head, int64_t i) const {
    const int64_t row = part.first + i;
    const int64_t place = (part.sequence->begin + row / group) * call.q.shape[1] + head * group + row % group;
    return call.carried + place * (width + 2);
  }

  void by_heads() {
    const int64_t heads = call.HKV, count = int64_t(parts.size()) * heads;
    parallel(count, threads, scratch_bytes + prepared_room() + 2 * room(), [&](int64_t task, char* scratch) {
      // The parts of a sequence see the same keys of a head, one part after the other.
      const Part& part = parts[size_t(task % int64_t(parts.size()))];
      const int64_t head = task / int64_t(parts.size());
      char *prepared = scratch + scratch_bytes, *rooms = prepared + prepared_room();
      prepare(part, head, prepared);
      const AttendRows all = rows_in(rooms, prepared, part), more = rows_in(rooms + room(), prepared, part);
      begin(part, head, all);
      for (int64_t c = part.first_chunk; c <= part.last_chunk; c++) {
        kernels.clear(call.form, more);
        blocks(part, c, [&](const Block& now, const Block& next) {
          const AttendKeys ahead = next.of(*part.sequence, head);
          kernels.block(call.form, now.of(*part.sequence, head), &ahead, more, scratch);
        });
        kernels.merge(call.form, all, more);
      }
      end(part, head, all);
    });
  }

  struct Task {
    const Part* part;
    int64_t chunk;
  };

  void by_chunks() {
    const int64_t heads = call.HKV, rooms_of_part = heads * room();
    const int64_t wave = std::max<int64_t>(ROOM / rooms_of_part, 4 * threads);
    std::vector<Task> tasks;
    for (const Part& part : parts)
      for (int64_t c = part.first_chunk; c <= part.last_chunk; c++) tasks.push_back({&part, c});
    const int64_t count = int64_t(tasks.size()), of_parts = int64_t(parts.size()) * heads;
    char* memory = kept(size_t(of_parts * (prepared_room() + room()) + std::min(wave, count) * rooms_of_part));
    char* prepared = memory;
    char* totals = prepared + of_parts * prepared_room();
    char* rooms = totals + of_parts * room();
    const auto prepared_of = [&](const Part& part, int64_t head) {
      return prepared + ((&part - parts.data()) * heads + head) * prepared_room();
    };
    const auto all_of = [&](const Part& part, int64_t head) {
      char* total = totals + ((&part - parts.data()) * heads + head) * room();
      return rows_in(total, prepared_of(part, head), part);
    };
    const auto of_each = [&](const auto& work) {
      for (const Part& part : parts)
        for (int64_t head = 0; head < heads; head++) work(part, head);
    };
    of_each([&](const Part& part, int64_t head) {
      prepare(part, head, prepared_of(part, head));
      begin(part, head, all_of(part, head));
    });
    for (int64_t from = 0; from < count; from += wave) {
      const int64_t there = std::min(wave, count - from);
      parallel_shares(there, threads, scratch_bytes, [&](int64_t i, char* scratch) {
        chunk(tasks[size_t(from + i)], rooms + i * rooms_of_part, prepared_of, scratch);
      });
      // Each row in the order of the keys, whoever has computed them.
      const int64_t rows = heads * most_rows, numbers = there * rows * width;
      parallel_shares(rows, numbers < MERGED_ALONE ? 1 : threads, 0, [&](int64_t row, char*) {
        const int64_t head = row / most_rows, of_head = row % most_rows;
        for (int64_t i = 0; i < there; i++) {
          const Part& part = *tasks[size_t(from + i)].part;
          if (of_head >= part.count) continue;
          const AttendRows more = rows_in(rooms + i * rooms_of_part + head * room(), prepared_of(part, head), part);
          kernels.merge(call.form, one_of(all_of(part, head), of_head), one_of(more, of_head));
        }
      });
    }
    of_each([&](const Part& part, int64_t head) { end(part, head, all_of(part, head)); });
  }

  // What all heads of a part get of a chunk.
  template <class PreparedOf>
  void chunk(const Task& task, char* rooms, const PreparedOf& prepared_of, char* scratch) const {
    const Part& part = *task.part;
    const AttendSequence& s = *part.sequence;
    const int64_t heads = call.HKV;
    const auto rows_of = [&](int64_t head) { return rows_in(rooms + head * room(), prepared_of(part, head), part); };
    for (int64_t head = 0; head < heads; head++) kernels.clear(call.form, rows_of(head));
    blocks(part, task.chunk, [&](const Block& now, const Block& next) {
      for (int64_t head = 0; head < heads; head++) {
        const AttendKeys ahead = head + 1 < heads ? now.of(s, head + 1) : next.of(s, 0);
        kernels.block(call.form, now.of(s, head), &ahead, rows_of(head), scratch);
      }
    });
  }
};

}  // namespace

void attend(const AttendCall& call, const AttendKernels& kernels, int threads) { Attend(call, kernels, threads).run(); }

int64_t attend_carried(const AttendForm& form, const AttendKernels& kernels) { return kernels.padded(form) + 2; }

}  // namespace intarsia
