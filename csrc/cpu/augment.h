// What every x86-64 level of augment_crops offers; see augment.cpp.
#pragma once
#include "../core/distill.h"

namespace mokd::cpu {

// Columns of a row of params.
enum Column { FLIP = 0, ORDER = 1, FACTORS = 5, GREY = 9, SIGMA = 10, SOLARIZE = 11, COLUMNS = 12 };

struct Augment {
  const uint8_t* crops;  // [B, H, W, C]: pixels of a row lie side by side
  int64_t crop_stride, row_stride;
  int64_t count, height, width;
  int channels;            // 1 or 3
  const float* params;     // [B, COLUMNS]
  float scale[3], shift[3];  // of the channels
  Type type;               // F32, BF16 or F16
  void* out;               // [B, H, W, C]
  int threads;
};

}  // namespace mokd::cpu
