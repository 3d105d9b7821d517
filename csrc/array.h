// A tensor as the callers hand it over: memory, dtype, shape and strides in numbers.
#pragma once

#include "task.h"

namespace intarsia {

struct Array {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int dims = 0;
  int64_t shape[5] = {};
  int64_t stride[5] = {};

  explicit operator bool() const { return data != nullptr; }

  template <class... Index>
  char* at(Index... index) const {
    const int64_t place[] = {int64_t(index)...};
    int64_t offset = 0;
    for (size_t d = 0; d < sizeof...(index); d++) offset += place[d] * stride[d];
    return data + offset * size_of(dtype);
  }
};

}  // namespace intarsia
