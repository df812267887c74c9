// What every x86-64 level offers for what stands between a transformer block's products; see block.cpp.
#pragma once
#include "../core/distill.h"

namespace mokd::cpu {

// Rows of `width` numbers, side by side; those of 16 bits are bf16.
struct Gelu {
  int64_t rows, width;
  int threads;
};

struct AddNorm {
  const float* x;      // [period, width]: row r is row r % period
  const void* y;       // [rows, width] to be added, or null
  Type type;           // of y: F32 or BF16
  const float* weight; // [width]
  const float* bias;   // [width]
  float eps;
  int64_t rows, width, period;
  int threads;
};

// Of a row: what backward wants to know.
struct NormStats {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

struct BlockKernels {
  void (*gelu)(const Gelu&, const uint16_t* u, uint16_t* g);
  // du = dg gelu'(u), g = gelu(u) once more, and du's sum over the rows [width].
  void (*gelu_backward)(const Gelu&, const uint16_t* u, const uint16_t* dg, uint16_t* du, uint16_t* g, float* sums);
  // x + y, unless y is null, and its normalised rows in bf16.
  void (*add_norm)(const AddNorm&, float* sum, uint16_t* normed, NormStats*);
  // `x` is the sum, `y` null. dsum (null: 0) and dnormed give dx, once more in bf16 unless dy is null, and
  // the parameters' gradients [width].
  void (*add_norm_backward)(const AddNorm&, const NormStats*, const float* dsum, const uint16_t* dnormed,
                            float* dx, uint16_t* dy, float* dweight, float* dbias);
  // [rows, width] -> [width], in fp32.
  void (*sum_rows)(const Gelu&, const uint16_t* x, float* sums);
};

}  // namespace mokd::cpu
