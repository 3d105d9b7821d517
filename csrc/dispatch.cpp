#include "dispatch.h"

#include <cstring>
#include <stdexcept>

#ifdef INTARSIA_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace intarsia {

// Each family of kernels has its table in the namespace of every instruction set.
#define INTARSIA_KERNELS(isa)                                                                       \
  namespace isa {                                                                                   \
  extern const LinearKernels linear_kernels;                                                        \
  extern const ConvKernels conv_kernels;                                                            \
  extern const NormKernels norm_kernels;                                                            \
  extern const DecodeKernels decode_kernels;                                                        \
  extern const FewRowsKernels few_rows_kernels;                                                     \
  extern const AttendKernels attend_kernels;                                                        \
  extern const SoftmaxKernels softmax_kernels;                                                      \
  extern const RowKernels row_kernels;                                                              \
  extern const SwigluKernels swiglu_kernels;                                                        \
  extern const PickKernels pick_kernels;                                                            \
  extern const GatheredKernels gathered_kernels;                                                    \
  static const Kernels kernels{#isa,           linear_kernels,   conv_kernels,   norm_kernels,      \
                               decode_kernels, few_rows_kernels, attend_kernels, softmax_kernels,   \
                               row_kernels,    swiglu_kernels,   pick_kernels,   gathered_kernels}; \
  }

INTARSIA_KERNELS(portable)
#ifdef INTARSIA_X86
INTARSIA_KERNELS(avx2)
INTARSIA_KERNELS(avx512)

// Those that add products of bfloat16 to AVX-512.
#define INTARSIA_NARROW_KERNELS(isa)                      \
  namespace isa {                                         \
  extern const LinearKernels linear_kernels;              \
  extern const FewRowsKernels few_rows_kernels;           \
  extern const AttendKernels attend_kernels;              \
  static const Kernels kernels{#isa,                      \
                               linear_kernels,            \
                               avx512::conv_kernels,      \
                               avx512::norm_kernels,      \
                               avx512::decode_kernels,    \
                               few_rows_kernels,          \
                               attend_kernels,            \
                               avx512::softmax_kernels,   \
                               avx512::row_kernels,       \
                               avx512::swiglu_kernels,    \
                               avx512::pick_kernels,      \
                               avx512::gathered_kernels}; \
  }

INTARSIA_NARROW_KERNELS(avx512_bf16)
INTARSIA_NARROW_KERNELS(amx)
#ifdef INTARSIA_EMULATE_AMX
INTARSIA_NARROW_KERNELS(amx_emulated)
#endif
#endif

namespace {

#ifdef INTARSIA_X86

// The levels x86-64-v3 and v4, which the kernels are compiled for.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

struct Features {  // of cpuid's leaf 7
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Features(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Asked once: a virtual machine's host answers cpuid, in many microseconds.
// Every processor with AVX512-BF16 has VNNI, too.
bool has_avx512_bf16() {
  static const bool there = has_avx512() && (Features(1).eax >> 5 & 1) && (Features(0).ecx >> 11 & 1);
  return there;
}

bool find_amx() {
  const unsigned edx = Features(0).edx;
  if (!has_avx512_bf16() || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;  // amx-bf16, amx-tile
#ifdef __linux__
  // Linux lets a process use the tiles when it has asked for them, once for all its threads.
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  static const bool there = find_amx();
  return there;
}

#endif

struct Entry {
  const Kernels* kernels;
  bool (*runs_here)();
};

const Entry ENTRIES[] = {
#ifdef INTARSIA_X86
    {&amx::kernels, has_amx},
    {&avx512_bf16::kernels, has_avx512_bf16},
    {&avx512::kernels, has_avx512},
    {&avx2::kernels, has_avx2},
#ifdef INTARSIA_EMULATE_AMX
    {&amx_emulated::kernels, has_avx512_bf16},
#endif
#endif
    {&portable::kernels, [] { return true; }},
};

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Entry& entry : ENTRIES)
    if (entry.runs_here()) names.emplace_back(entry.kernels->name);
  return names;
}

std::string maker() {
#ifdef INTARSIA_X86
  unsigned most, letters[3];
  if (__get_cpuid(0, &most, &letters[0], &letters[2], &letters[1])) {
    char name[sizeof letters];
    std::memcpy(name, letters, sizeof name);
    return std::string(name, sizeof name);
  }
#endif
  return "";
}

const Kernels& kernels_of(const std::string& name) {
  for (const Entry& entry : ENTRIES)
    if (name == entry.kernels->name && entry.runs_here()) return *entry.kernels;
  std::string known;
  for (const std::string& other : available()) known += (known.empty() ? "" : ", ") + other;
  throw std::invalid_argument("there is no instruction set '" + name + "' here; there are " + known);
}

}  // namespace intarsia
