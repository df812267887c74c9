// What every x86-64 level offers for gradients; see clip.cpp.
#pragma once
#include <cstdint>

namespace mokd::cpu {

// Gradients of a model, each `sizes[i]` numbers side by side.
struct Clip {
  float* const* grads;
  const int64_t* sizes;
  int64_t count;
  float max_norm;
  float* norms;  // [count], of before
  int threads;
};

}  // namespace mokd::cpu
