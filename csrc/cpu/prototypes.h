// What every x86-64 level offers for matrices of prototypes; see prototypes.cpp.
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

// found [rows] = matrix [rows, width] @ vector [width].
struct Matvec {
  const void* matrix;
  Type type;  // of the matrix: F32, BF16 or F16
  int64_t rows, width;
  const float* vector;
  float* found;
  int threads;
};

struct PrototypeKernels {
  void (*weight_norm)(const WeightNorm&, void* w);  // [rows, width]
  // Of w's gradient [rows, width], for v [rows, width] and g [rows].
  void (*weight_norm_backward)(const WeightNorm&, const void* grad, float* for_v, float* for_g);
  void (*matvec)(const Matvec&);
};

}  // namespace mokd::cpu
