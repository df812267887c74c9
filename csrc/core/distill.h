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

static MOKD_HOST_DEVICE inline int64_t item_size(Type type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

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

// stats [V + T, B, 2] of the arithmetic's type: the maximum of a row's logits (of a teacher's less the
// centre), and the sum of exp((logit - maximum) / tau), of a student its logarithm. terms [targets] and
// loss [1], of the arithmetic's type.
struct Forward {
  void* stats;
  void* terms;
  void* loss;
};

// gradient [V, B, K] contiguous, of the student's type; grad_output [1] and stats as above.
struct Backward {
  const void* stats;
  const void* grad_output;
  void* gradient;
  bool reused;  // read again at once, as a chunk of columns is by two products: it stays in the caches
};

// A chunk of the K columns of a call, from the left to the right. It needs no more of the others than
// what forward keeps between two chunks.
struct Chunk {
  bool first, last;
};

// One piece of work: columns [begin, end) of one image. Pieces count along the columns first.
struct Tile {
  int64_t image, begin, end;
};

static MOKD_HOST_DEVICE inline int64_t tiles(const Shape& shape, int64_t tile) {
  return (shape.columns + tile - 1) / tile;  // of one image
}

static MOKD_HOST_DEVICE inline Tile tile_at(const Shape& shape, int64_t tile, int64_t item) {
  const int64_t each = tiles(shape, tile), begin = item % each * tile;
  return {item / each, begin, begin + tile < shape.columns ? begin + tile : shape.columns};
}

// One row over some columns: its maximum and sum exp(x - max). Of a row of given probabilities: 0 and
// their sum. Functions are static: each x86-64 level compiles its own.
struct Partial {
  double max, sum;
};

// exp(x) for x <= 0; of two neighbours one always has the larger maximum and the factor 1. A: how exact.
template <typename A = double>
static MOKD_HOST_DEVICE inline double decay(double x) { return x == 0 ? 1 : double(exp(A(x))); }

static MOKD_HOST_DEVICE inline Partial merge(Partial a, Partial b) {
  double max = a.max < b.max ? b.max : a.max;
  return {max, a.sum * decay(a.max - max) + b.sum * decay(b.max - max)};
}

// The dot of a pair, sum exp(u - teacher.max) (z - student.max), as if the student's maximum were `top`.
static MOKD_HOST_DEVICE inline double dot_at(double dot, Partial teacher, Partial student, double top) {
  return dot + teacher.sum * (student.max - top);
}

// That over the columns of a and of b.
static MOKD_HOST_DEVICE inline double merge_dots(double a, Partial teacher_a, Partial student_a,
                                                 double b, Partial teacher_b, Partial student_b) {
  double high = teacher_a.max < teacher_b.max ? teacher_b.max : teacher_a.max;
  double top = student_a.max < student_b.max ? student_b.max : student_a.max;
  return decay(teacher_a.max - high) * dot_at(a, teacher_a, student_a, top) +
         decay(teacher_b.max - high) * dot_at(b, teacher_b, student_b, top);
}

// What one piece of work knows: every teacher row, every student row, the dot of every pair.
struct State {
  Partial *teacher, *student;  // [T], [V]
  double* dot;                 // [T, V]
};

static MOKD_HOST_DEVICE inline int64_t state_size(const Shape& s) {
  return 2 * (s.teachers + s.views) + int64_t(s.teachers) * s.views;
}

static MOKD_HOST_DEVICE inline State state_at(double* at, const Shape& s) {
  Partial* rows = reinterpret_cast<Partial*>(at);
  return {rows, rows + s.teachers, at + 2 * (s.teachers + s.views)};
}

// - sum q (z - lse), of a pair over all columns. Given probabilities need not sum to 1.
static MOKD_HOST_DEVICE inline double cross_entropy(double dot, Partial teacher, Partial student,
                                                    bool probabilities) {
  double log_sum = log(student.sum);
  return probabilities ? teacher.sum * log_sum - dot : log_sum - dot / teacher.sum;
}

// Below, D is the call of one side, with shape, teacher, pairs [T, V], targets (their number) and
// scalars [1 + 2 targets]: temperatures, the student's first, then weights. A is the arithmetic's type.

template <typename A, typename D>
static MOKD_HOST_DEVICE inline A scalar(const D& d, int i) {
  return static_cast<const A*>(d.scalars)[i];
}

// tau of teacher row t, or of the student for t < 0.
template <typename A, typename D>
static MOKD_HOST_DEVICE inline A temperature(const D& d, int t) {
  if (t >= 0 && d.teacher[t].probabilities) return A(1);
  return scalar<A>(d, t < 0 ? 0 : 1 + d.teacher[t].target);
}

template <typename A, typename D>
static MOKD_HOST_DEVICE inline double weight(const D& d, int target) {
  return scalar<A>(d, 1 + d.targets + target);
}

template <typename A, typename D>
static MOKD_HOST_DEVICE inline A inverse_temperature(const D& d, int t) {
  return A(1) / temperature<A>(d, t);
}

template <typename A>
static MOKD_HOST_DEVICE inline double row_weight(const Teacher& teacher, int64_t b) {
  return teacher.row_weight ? double(static_cast<const A*>(teacher.row_weight)[b]) : 1.0;
}

// Where the stats of a row stand: student views first, then teacher rows.
static MOKD_HOST_DEVICE inline int64_t student_stats(const Shape& s, int v, int64_t b) {
  return (v * s.images + b) * 2;
}

static MOKD_HOST_DEVICE inline int64_t teacher_stats(const Shape& s, int t, int64_t b) {
  return ((s.views + t) * s.images + b) * 2;
}

// Without any pair the gradient of a view is 0, whatever its logits.
template <typename D>
static MOKD_HOST_DEVICE inline bool has_pair(const D& d, int v) {
  for (int t = 0; t < d.shape.teachers; ++t)
    if (d.pairs[t * d.shape.views + v] != 0) return true;
  return false;
}

// The gradient of s_v is grad_output / (tau_s B) * (n_v softmax(z_v) - sum_t c_tv q_t).
template <typename A, typename D>
static MOKD_HOST_DEVICE inline double coefficient(const D& d, int t, int v, int64_t b) {  // c_tv
  const double pair = d.pairs[t * d.shape.views + v];
  return pair == 0 ? 0 : pair * weight<A>(d, d.teacher[t].target) * row_weight<A>(d.teacher[t], b);
}

// n_v: the coefficients times the mass of their rows, which is 1 but for given probabilities.
template <typename A, typename D>
static MOKD_HOST_DEVICE inline double mass(const D& d, const A* stats, int v, int64_t b) {
  double total = 0;
  for (int t = 0; t < d.shape.teachers; ++t)
    if (d.pairs[t * d.shape.views + v] != 0)  // without a pair a row may hold NaN
      total += coefficient<A>(d, t, v, b) *
               (d.teacher[t].probabilities ? double(stats[teacher_stats(d.shape, t, b) + 1]) : 1.0);
  return total;
}

}  // namespace mokd
