// Plain data that kernels are given, the same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

// Functions that every instruction set's code uses are always inlined: a copy of their own, made with the flags of
// one instruction set, would be shared by all.
#define INLINE inline __attribute__((always_inline))

namespace intarsia {

enum class Dtype : int32_t { float32, float64, bfloat16 };

INLINE constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The rows of one head: row t begins `t * stride` bytes after `data`, and its numbers lie side by side.
struct Rows {
  char* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::float32;

  INLINE explicit operator bool() const { return data != nullptr; }
  INLINE Rows columns_from(int64_t column) const {
    return data ? Rows{data + column * size_of(dtype), stride, dtype} : *this;
  }
  INLINE Rows rows_from(int64_t row) const { return data ? Rows{data + row * stride, stride, dtype} : *this; }
};

// Scratch memory, handed out piece by piece. With no memory behind it, it only counts.
class Arena {
 public:
  INLINE explicit Arena(char* base = nullptr) : base_(base) {}
  template <class R>
  INLINE R* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(R)) + 63) / 64 * 64;
    return reinterpret_cast<R*>(piece);
  }
  INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace intarsia
