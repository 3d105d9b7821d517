// The kernels of row programs for one instruction set: this file is compiled once for each.
#include "row_task.h"
#include "rows.h"

namespace intarsia::INTARSIA_ISA {

namespace {

// Numbers that are worked on at a time, in float32.
constexpr int64_t PIECE = 256;

// Calls `work(column, count)` for the pieces of a row.
template <class Work>
INLINE void in_pieces(int64_t width, const Work& work) {
  for (int64_t column = 0; column < width; column += PIECE)
    work(column, int(width - column < PIECE ? width - column : PIECE));
}

void swiglu(const Rows& gate, const Rows& up, const Rows& y, int64_t row, int64_t width) {
  alignas(64) float a[PIECE], b[PIECE];
  in_pieces(width, [&](int64_t column, int count) {
    const int whole = padded<float>(count);
    read_row(gate.columns_from(column), row, a, count, whole);
    read_row(up.columns_from(column), row, b, count, whole);
    for (int i = 0; i < whole; i += LANES<float>) {
      const Vec<float> x = load(a + i);
      store<float>(a + i, x * sigmoid<float>(x) * load(b + i));
    }
    write_row(y.columns_from(column), row, a, count);
  });
}

void add(const Rows& x, double scale, const Rows& y, int64_t row, int64_t width) {
  alignas(64) float a[PIECE], b[PIECE];
  in_pieces(width, [&](int64_t column, int count) {
    const int whole = padded<float>(count);
    read_row(x.columns_from(column), row, a, count, whole);
    read_row(y.columns_from(column), row, b, count, whole);
    for (int i = 0; i < whole; i += LANES<float>) store<float>(b + i, load(b + i) * float(scale) + load(a + i));
    write_row(y.columns_from(column), row, b, count);
  });
}

}  // namespace

extern const RowKernels row_kernels{swiglu, add};

}  // namespace intarsia::INTARSIA_ISA
