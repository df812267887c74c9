// The weighted pair cross-entropy: what CPU and CUDA share. Formula: mokd_fast/ops/distill.py.
//
//   z_v = s_v / tau_s     u_t = (l_t - center_t) / tau_t     q_t = softmax(u_t)
//   CE[t,v] = log sum exp z_v - <q_t, z_v>
//
// Columns are cut into blocks; each block gives a Partial of every row and a dot of every pair, all
// relative to the block's own maxima, and `merge` joins two neighbours exactly. The maximum of the
// student cancels in `cross_entropy`, so no digit is lost to a large common offset.
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

// One row over some columns: its maximum and sum exp(x - max). Of a row of given probabilities: 0 and
// their sum. Functions are static: each x86-64 level compiles its own.
struct Partial {
  double max, sum;
};

// exp(x) for x <= 0; of two neighbours one always has the larger maximum and the factor 1.
static MOKD_HOST_DEVICE inline double decay(double x) { return x == 0 ? 1 : exp(x); }

static MOKD_HOST_DEVICE inline Partial merge(Partial a, Partial b) {
  double max = a.max < b.max ? b.max : a.max;
  return {max, a.sum * decay(a.max - max) + b.sum * decay(b.max - max)};
}

// The dot of a pair, sum exp(u - teacher.max) (z - student.max), over the columns of a and of b.
static MOKD_HOST_DEVICE inline double merge_dots(double a, Partial teacher_a, Partial student_a,
                                                 double b, Partial teacher_b, Partial student_b) {
  double high = teacher_a.max < teacher_b.max ? teacher_b.max : teacher_a.max;
  double top = student_a.max < student_b.max ? student_b.max : student_a.max;
  return decay(teacher_a.max - high) * (a + teacher_a.sum * (student_a.max - top)) +
         decay(teacher_b.max - high) * (b + teacher_b.sum * (student_b.max - top));
}

// - sum q (z - lse), of a pair over all columns. Given probabilities need not sum to 1.
static MOKD_HOST_DEVICE inline double cross_entropy(double dot, Partial teacher, Partial student,
                                                    bool probabilities) {
  double log_sum = log(student.sum);
  return probabilities ? teacher.sum * log_sum - dot : log_sum - dot / teacher.sum;
}

}  // namespace mokd
