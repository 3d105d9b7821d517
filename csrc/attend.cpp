#include "attend.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "parallel.h"

namespace intarsia {

namespace {

// Some rows of a sequence's queries, with one key head: row i is of token `token + i / group`, head
// `head * group + i % group`.
struct Part {
  const AttendSequence* sequence;
  int64_t head, first, count;       // rows of the sequence and the key head
  int64_t first_chunk, last_chunk;  // that they see
  int64_t slot;                     // of the first of these in the room for what chunks give
};

// Memory that a thread keeps for its next call: fresh one would be paid for in page faults.
char* kept(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

class Attend {
 public:
  Attend(const AttendCall& call, const AttendKernels& kernels, int threads)
      : call(call),
        kernels(kernels),
        threads(threads),
        group(call.q.shape[1] / call.HKV),
        q_bytes(kernels.prepared(call.form)),
        width(kernels.padded(call.form)) {}

  void run() {
    divide();
    // Where parts are few, their chunks are shared out; else a thread does all of a part, in the same order.
    if (int64_t(parts.size()) < 4 * threads && chunks > int64_t(parts.size()))
      by_chunks();
    else
      by_parts();
  }

 private:
  const AttendCall& call;
  const AttendKernels& kernels;
  int threads;
  int64_t group, q_bytes, width, chunks = 0;
  std::vector<Part> parts;

  void divide() {
    for (int64_t n = 0; n < call.count; n++) {
      const AttendSequence& s = call.sequences[n];
      const int64_t tokens = s.end - s.begin, rows = tokens * group;
      for (int64_t head = 0; head < call.HKV; head++)
        for (int64_t first = 0; first < rows; first += ATTEND_ROWS) {
          const int64_t count = std::min<int64_t>(ATTEND_ROWS, rows - first);
          const int64_t from = position(s, first), to = position(s, first + count - 1);
          const int64_t seen = call.form.window ? std::max<int64_t>(0, from - call.form.window + 1) : 0;
          Part part{&s, head, first, count, std::max(seen, s.held) / ATTEND_CHUNK, to / ATTEND_CHUNK, chunks};
          chunks += part.last_chunk - part.first_chunk + 1;
          parts.push_back(part);
        }
    }
  }

  int64_t position(const AttendSequence& s, int64_t row) const { return s.keys - (s.end - s.begin) + row / group; }

  // Room for the rows of a part: what they have of one chunk.
  int64_t room() const { return (ATTEND_ROWS * (width + 2) * 4 + 63) / 64 * 64; }
  int64_t prepared_room() const { return (ATTEND_ROWS * (q_bytes + 8) + 63) / 64 * 64; }

  AttendRows rows_in(char* memory, const char* prepared, const Part& part) const {
    float* numbers = reinterpret_cast<float*>(memory);
    return {int(part.count),
            prepared,
            reinterpret_cast<const int64_t*>(prepared + ATTEND_ROWS * q_bytes),
            numbers + ATTEND_ROWS * width,
            numbers + ATTEND_ROWS * (width + 1),
            numbers};
  }

  void prepare(const Part& part, char* to) const {
    const AttendSequence& s = *part.sequence;
    int64_t* positions = reinterpret_cast<int64_t*>(to + ATTEND_ROWS * q_bytes);
    for (int64_t i = 0; i < part.count; i++) {
      const int64_t row = part.first + i;
      positions[i] = position(s, row);
      const Rows q{call.q.at(s.begin + row / group, part.head * group + row % group), 0, call.q.dtype};
      kernels.prepare(call.form, q, 0, to + i * q_bytes);
    }
  }

  void chunk(const Part& part, int64_t number, const AttendRows& rows, char* scratch) const {
    const AttendSequence& s = *part.sequence;
    AttendKeys keys;
    keys.first = number * ATTEND_CHUNK;
    const int64_t last = position(s, part.first + part.count - 1) + 1;
    keys.last = std::min<int64_t>(keys.first + ATTEND_CHUNK, last);
    // Before the first one that is held nothing is seen: any address does.
    for (int64_t i = keys.first; i < keys.last; i++) {
      const int64_t entry = std::max(i, s.held);
      keys.k[i - keys.first] = s.k.at(entry, part.head);
      keys.v[i - keys.first] = s.v.at(entry, part.head);
    }
    kernels.chunk(call.form, keys, rows, scratch);
  }

  void finish(const Part& part, const AttendRows& rows) const {
    const AttendSequence& s = *part.sequence;
    for (int64_t i = 0; i < part.count; i++) {
      const int64_t row = part.first + i, head = part.head * group + row % group;
      const Rows o{call.o.at(s.begin + row / group, head), 0, call.o.dtype};
      const double sink = call.sinks ? double(call.sinks[head]) : -std::numeric_limits<double>::infinity();
      kernels.finish(call.form, rows, int(i), sink, o, 0);
    }
  }

  void by_parts() {
    const int64_t scratch = (kernels.scratch(call.form) + 63) / 64 * 64;
    parallel(int64_t(parts.size()), threads, scratch + prepared_room() + 2 * room(), [&](int64_t i, char* memory) {
      const Part& part = parts[size_t(i)];
      char* prepared = memory + scratch;
      prepare(part, prepared);
      const AttendRows all = rows_in(prepared + prepared_room(), prepared, part);
      const AttendRows more = rows_in(prepared + prepared_room() + room(), prepared, part);
      for (int64_t c = part.first_chunk; c <= part.last_chunk; c++) {
        chunk(part, c, c == part.first_chunk ? all : more, memory);
        if (c > part.first_chunk) kernels.merge(call.form, all, more);
      }
      finish(part, all);
    });
  }

  void by_chunks() {
    std::vector<const Part*> part_of;
    for (const Part& part : parts) part_of.insert(part_of.end(), size_t(part.last_chunk - part.first_chunk + 1), &part);
    char* memory = kept(size_t(int64_t(parts.size()) * prepared_room() + chunks * room()));
    char* rooms = memory + int64_t(parts.size()) * prepared_room();
    const auto prepared = [&](const Part& part) { return memory + (&part - parts.data()) * prepared_room(); };
    for (const Part& part : parts) prepare(part, prepared(part));
    parallel(chunks, threads, kernels.scratch(call.form), [&](int64_t i, char* scratch) {
      const Part& part = *part_of[size_t(i)];
      chunk(part, part.first_chunk + i - part.slot, rows_in(rooms + i * room(), prepared(part), part), scratch);
    });
    for (const Part& part : parts) {
      const AttendRows all = rows_in(rooms + part.slot * room(), prepared(part), part);
      for (int64_t c = 1; c <= part.last_chunk - part.first_chunk; c++)
        kernels.merge(call.form, all, rows_in(rooms + (part.slot + c) * room(), prepared(part), part));
      finish(part, all);
    }
  }
};

}  // namespace

void attend(const AttendCall& call, const AttendKernels& kernels, int threads) { Attend(call, kernels, threads).run(); }

}  // namespace intarsia
