// Products of features with prototypes; see prototype_linear_bf16.cpp and prototype_linear_fp32.cpp.
#pragma once
#include <cstdint>

namespace mokd::cpu {

// Rows B of features, prototypes K and width D; K and D are multiples of 32. In bf16 (I = uint16_t) or fp32.
template <typename I>
struct PrototypeLinear {
  const I* x;  // [B, D]
  int64_t rows, prototypes, width;
  const I* w;      // [K, D], or null and w = g v / |v|:
  const float* v;  // [K, D]
  const float* g;  // [K]
  float* norms;    // [K], |v|: written by forward, read by backward
  int threads;
};

struct Gradients {
  float *x, *v, *g;  // [B, D], [K, D], [K]
  float* v_norm;     // [1]: the L2 norm of v's
};

template <typename I>
struct PrototypeLinearKernels {
  void (*forward)(const PrototypeLinear<I>&, I* logits);  // [B, K]
  // Of g v / |v|, from the logits' gradient [B, K].
  void (*backward)(const PrototypeLinear<I>&, const I* grad, const Gradients&);
};

// Null where the processor has no bf16 products (AVX512-BF16).
const PrototypeLinearKernels<uint16_t>* prototype_linear_bf16();

}  // namespace mokd::cpu
