// Which x86-64 level runs: chosen once at load, or forced by name.
#include <cstring>

#include "attention.h"
#include "distill.h"
#include "prototype_linear.h"

namespace mokd::cpu {

extern const Kernels kernels_baseline;
#ifdef MOKD_X86
extern const Kernels kernels_v3, kernels_v4;
#endif
#ifdef MOKD_BF16
extern const AttentionKernels attention_kernels_bf16;
extern const PrototypeLinearKernels<uint16_t> prototype_linear_kernels_bf16;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool runs;
};

bool has_v3() {
#ifdef MOKD_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool has_v4() {
#ifdef MOKD_X86
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

#ifdef MOKD_BF16
bool has_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const Kernels* kernels(const char* forced) {
  const Level levels[] = {
#ifdef MOKD_X86
      {&kernels_v4, has_v4()},
      {&kernels_v3, has_v3()},
#endif
      {&kernels_baseline, true},
  };
  for (const Level& level : levels) {
    if (!level.runs) continue;
    if (!forced || !*forced || !std::strcmp(forced, level.kernels->level)) return level.kernels;
  }
  return nullptr;
}

const AttentionKernels* attention() {
#ifdef MOKD_BF16
  if (has_bf16()) return &attention_kernels_bf16;
#endif
  return nullptr;
}

const PrototypeLinearKernels<uint16_t>* prototype_linear_bf16() {
#ifdef MOKD_BF16
  if (has_bf16()) return &prototype_linear_kernels_bf16;
#endif
  return nullptr;
}

}  // namespace mokd::cpu
