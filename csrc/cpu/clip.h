// What every x86-64 level offers for gradients; see clip.cpp.
#pragma once
#include <cfloat>
#include <cstdint>

namespace mokd::cpu {

// What a gradient of this norm is multiplied with: 1, or less where the norm exceeds the maximum. NaN goes on,
// to be seen, and without a maximum nothing is scaled.
inline float clip_scale(float norm, float max_norm) {
  const float scale = max_norm / (norm + 1e-6f);
  return scale >= 1 || max_norm > FLT_MAX ? 1 : scale;
}

// Gradients of a model, each `sizes[i]` numbers side by side.
struct Clip {
  float* const* grads;
  const int64_t* sizes;
  int64_t count;
  float max_norm;  // infinity: the norms alone
  float* norms;  // [count], of before: they are made, or
  bool known;    // there
  int threads;
};

}  // namespace mokd::cpu
