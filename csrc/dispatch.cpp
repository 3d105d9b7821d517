#include "dispatch.h"

#include <stdexcept>

namespace intarsia {

// Each family of kernels has its table in the namespace of every instruction set.
#define INTARSIA_KERNELS(isa)                                                     \
  namespace isa {                                                                 \
  extern const LinearKernels linear_kernels;                                      \
  extern const ConvKernels conv_kernels;                                          \
  extern const NormKernels norm_kernels;                                          \
  static const Kernels kernels{#isa, linear_kernels, conv_kernels, norm_kernels}; \
  }

INTARSIA_KERNELS(portable)
#ifdef INTARSIA_X86
INTARSIA_KERNELS(avx2)
INTARSIA_KERNELS(avx512)
#endif

namespace {

struct Entry {
  const Kernels* kernels;
  bool (*runs_here)();
};

const Entry ENTRIES[] = {
#ifdef INTARSIA_X86
    // x86-64-v4 and v3, the levels that the kernels are compiled for.
    {&avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
     }},
    {&avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
     }},
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

const Kernels& kernels_of(const std::string& name) {
  for (const Entry& entry : ENTRIES)
    if (name == entry.kernels->name && entry.runs_here()) return *entry.kernels;
  std::string known;
  for (const std::string& other : available()) known += (known.empty() ? "" : ", ") + other;
  throw std::invalid_argument("there is no instruction set '" + name + "' here; there are " + known);
}

}  // namespace intarsia
