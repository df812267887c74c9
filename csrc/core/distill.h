// The weighted pair cross-entropy: what CPU and CUDA share. Formula: mokd_fast/ops/distill.py.
//
//   z_v = s_v / tau_s     u_t = (l_t - center_t) / tau_t     q_t = softmax(u_t)
//   CE[t,v] = log sum exp z_v - <q_t, z_v>
//
// Columns are cut into blocks; each block gives a Partial of every row and a dot of every pair, all
// relative to the block's own maxima, and `merge` joins two neighbours exactly. The maximum of the
// student cancels: CE = log(sum_v) - dot/sum_t, so no digit is lost to a large common offset.
//
// V student views, T teacher rows, B images, K prototypes (columns).
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MOKD_HOST_DEVICE __host__ __device__
#else
#define MOKD_HOST_DEVICE
#endif

namespace mokd {

enum Type : int { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

// One row of logits for every image: element k of image b at data[b * image + k * column].
struct Rows {
  const void* data;
  Type type;
  int64_t image, column;  // strides in elements
};

// One teacher row. With `probabilities` the data are q itself: no centre, no temperature.
struct Teacher {
  Rows rows;
  const void* center;      // [K] of the arithmetic's type, or null
  const void* row_weight;  // [B] of the arithmetic's type, or null
  int target;              // which target it belongs to: temperature and per-target term
  bool probabilities;
};

struct Shape {
  int64_t images, columns;
  int views, teachers;
};

}  // namespace mokd
