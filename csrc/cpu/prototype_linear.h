// Products of bf16 features with prototypes; see prototype_linear.cpp.
#pragma once
#include <cstdint>

namespace mokd::cpu {

// Rows B of features, prototypes K and width D; K and D are multiples of 32.
struct PrototypeLinear {
  const uint16_t* x;  // [B, D]
  int64_t rows, prototypes, width;
  const uint16_t* w;  // [K, D], or null and w = g v / |v|:
  const float* v;     // [K, D]
  const float* g;     // [K]
  float* norms;       // [K], |v|: written by forward, read by backward
  int threads;
};

struct PrototypeLinearKernels {
  void (*forward)(const PrototypeLinear&, uint16_t* logits);  // [B, K]
  // Of g v / |v|, from the logits' gradient [B, K]: for x [B, D], v [K, D] and g [K].
  void (*backward)(const PrototypeLinear&, const uint16_t* grad, float* for_x, float* for_v, float* for_g);
};

// Null where the processor has no bf16 products (AVX512-BF16).
const PrototypeLinearKernels* prototype_linear();

}  // namespace mokd::cpu
