// The tile registers of AMX: eight, of 16 rows of 64 bytes each. With INTARSIA_TILES_EMULATED they are arrays, so that
// everything around them can be tested on processors without AMX.
#pragma once

#include "rows.h"

namespace intarsia::INTARSIA_ISA {

#ifdef INTARSIA_TILES_EMULATED

struct TileRegisters {
  TileRegisters() {}
};

class Tiles {
 public:
  template <int T>
  void zero() {
    __builtin_memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tiles_[T][r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int T>
  void store(void* to, int64_t stride) const {
    for (int r = 0; r < 16; r++) __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles_[T][r], 64);
  }
  // C += A B, where B holds pairs of rows.
  template <int C, int A, int B>
  void add_product() {
    for (int r = 0; r < 16; r++)
      for (int t = 0; t < 16; t++)
        for (int j = 0; j < 16; j++) {
          const uint32_t a = tiles_[A][r][t], b = tiles_[B][t][j];
          float c;
          __builtin_memcpy(&c, &tiles_[C][r][j], 4);
          c += widen(uint16_t(a)) * widen(uint16_t(b)) + widen(uint16_t(a >> 16)) * widen(uint16_t(b >> 16));
          __builtin_memcpy(&tiles_[C][r][j], &c, 4);
        }
  }

 private:
  uint32_t tiles_[8][16][16];
};

#else

// Takes the tile registers of this thread into use, and gives them back.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The instructions themselves and not the compilers' intrinsics, whose names for registers cannot be template
// arguments and whose configuration gcc 12 reads only in part.
struct Tiles {
  template <int T>
  INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  INLINE void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#endif

}  // namespace intarsia::INTARSIA_ISA
