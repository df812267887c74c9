// Self-attention in bf16, for processors with products of it; see attention.cpp.
#pragma once
#include <cstdint>

namespace mokd::cpu {

struct Attention {
  const uint16_t* qkv;  // [B, N, 3, H, d], contiguous
  int64_t images, tokens, heads, width;  // B, N, H, d
  float scale;                           // of the scores
  float* stats;                          // [B, H, N]: log2 of the sums of exponentials; may be null in forward
  int threads;
};

struct AttentionKernels {
  void (*forward)(const Attention&, uint16_t* out);  // [B, N, H, d]
  // `grad` is `out`'s; written is qkv's.
  void (*backward)(const Attention&, const uint16_t* out, const uint16_t* grad, uint16_t* for_qkv);
};

// Null where the processor (or the compiler of this module) has no products of bf16.
const AttentionKernels* attention();

}  // namespace mokd::cpu
