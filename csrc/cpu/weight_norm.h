// What every x86-64 level of weight_norm offers; see weight_norm.cpp.
#pragma once
#include "../core/distill.h"

namespace mokd::cpu {

struct WeightNorm {
  const float* v;  // [rows, width]
  const float* g;  // [rows]
  int64_t rows, width;
  float* norms;    // [rows], |v|: written by forward, read by backward
  Type type;       // of w and its gradient: BF16 or F16
  int threads;
};

struct WeightNormKernels {
  void (*forward)(const WeightNorm&, void* w);  // [rows, width]
  // Of w's gradient [rows, width]; `for_g` [rows] may be null.
  void (*backward)(const WeightNorm&, const void* grad, float* for_v, float* for_g);
};

}  // namespace mokd::cpu
