// What every x86-64 level offers for batch norm; see batch_norm.cpp.
#pragma once
#include "../core/distill.h"

namespace mokd::cpu {

struct BatchNorm {
  const void* x;  // [rows, channels]
  Type type;      // of x, what is added, the result and their gradients: F32 or BF16
  int64_t rows, channels;
  const float *weight, *bias;  // [channels]
  float* stats;                // [3, channels]: mean, 1 / std, unbiased variance; forward writes it
  bool relu;
  int threads;
};

// All but the sums over rows [channels] are [rows, channels]. `masked` and dx begin on a cache line.
struct BatchNormBackward {
  const void* grad;
  const void* y;            // what forward gave: where it added something and clipped the sum. Or null
  void* masked;             // with y: the gradient of what was added
  void* dx;
  float *for_weight, *for_bias;
};

struct BatchNormKernels {
  // y = weight (x - mean) / std + bias, + `added` unless that is null, max(0, y) with relu; y
  // begins on a cache line.
  void (*forward)(const BatchNorm&, double eps, const void* added, void* y);
  void (*backward)(const BatchNorm&, const BatchNormBackward&);
};

}  // namespace mokd::cpu
