// distill_cross_entropy on the CPU. Compiled once for every x86-64 level (MOKD_LEVEL), so nothing
// here may come from a header as an inline function: the linker would keep one copy for all levels.
//
// Forward reads every student and teacher row once (4 (V + T) B K bytes in fp32) and keeps
// 2 (V + T) B numbers; backward reads them once more and writes the gradient once. Work is cut into
// (image, tile of columns); tiles are merged in index order, so the thread count changes no bit.
#include "distill.h"

#include <cfloat>
#include <cstdlib>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define MOKD_JOIN_(a, b) a##b
#define MOKD_JOIN(a, b) MOKD_JOIN_(a, b)
#define MOKD_STRING_(a) #a
#define MOKD_STRING(a) MOKD_STRING_(a)

namespace mokd::cpu {
namespace {

constexpr int64_t BLOCK = 1024;      // columns worked on at a time: rows of a block stay in L1
constexpr int64_t TILE = 8 * BLOCK;  // columns of one piece of work

// exp(x) for x <= 0, without a branch; exact 0 below the smallest normal number, NaN for NaN.
inline float exp_negative(float x) {
  const float low = -87.0f;
  float y = x < low ? low : x;  // NaN passes
  float n = y * 1.44269504f + 12582912.0f;  // round to nearest through the mantissa
  union { float f; int32_t i; } bits = {n};
  n -= 12582912.0f;
  float r = y - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  union { int32_t i; float f; } scale = {(bits.i << 23) + 0x3f800000};
  float e = p * scale.f;
  return x < low ? 0.0f : e;
}

inline double exp_negative(double x) { return __builtin_exp(x); }

inline float widen(uint16_t h, Type type) {
  union { uint32_t i; float f; } bits;
  if (type == BF16) {
    bits.i = uint32_t(h) << 16;
    return bits.f;
  }
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  bits.i = rest << 13;
  bits.f *= 5.192296858534828e33f;  // 2^112: moves the exponent, subnormals too
  if (rest >= 0x7c00) bits.i |= 0x7f800000;
  bits.i |= sign;
  return bits.f;
}

inline uint16_t narrow_bf16(float x) {
  union { float f; uint32_t i; } bits = {x};
  uint32_t rounded = (bits.i + 0x7fff + ((bits.i >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : uint16_t(rounded);
}

inline uint16_t narrow_f16(float x) {
  union { float f; uint32_t i; } bits = {x};
  uint32_t sign = (bits.i >> 16) & 0x8000, rest = bits.i & 0x7fffffff;
  union { uint32_t i; float f; } abs = {rest};
  if (rest >= 0x47800000) return sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (rest < 0x38800000) {  // subnormal: let the addition round
    abs.f += 0.5f;
    return sign | uint16_t(abs.i - 0x3f000000);
  }
  rest += 0xc8000fff + ((rest >> 13) & 1);
  return sign | uint16_t(rest >> 13);
}

// x[k] = (row[k] - center[k]) * scale for n columns from k0; returns their maximum.
template <typename A>
A load(const Rows& rows, int64_t b, int64_t k0, int64_t n, const A* center, A scale, A* x) {
  const int64_t first = b * rows.image + k0 * rows.column, step = rows.column;
  if (rows.type == F32) {
    const float* p = static_cast<const float*>(rows.data) + first;
    if (step == 1) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) x[k] = p[k];
    } else {
      for (int64_t k = 0; k < n; ++k) x[k] = p[k * step];
    }
  } else if (rows.type == F64) {
    const double* p = static_cast<const double*>(rows.data) + first;
    for (int64_t k = 0; k < n; ++k) x[k] = A(p[k * step]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(rows.data) + first;
    int64_t k = 0;
    if (step == 1 && rows.type == BF16) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        union { uint32_t i; float f; } bits = {uint32_t(p[i]) << 16};
        x[i] = bits.f;
      }
      k = n;
    }
#ifdef __F16C__
    if (step == 1 && rows.type == F16 && sizeof(A) == 4) {
      for (; k + 8 <= n; k += 8) {
        __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k));
        _mm256_storeu_ps(reinterpret_cast<float*>(x + k), _mm256_cvtph_ps(h));
      }
    }
#endif
    for (; k < n; ++k) x[k] = widen(p[k * step], rows.type);
  }
  A top = sizeof(A) == 4 ? A(-FLT_MAX) : A(-DBL_MAX);  // a row of -inf keeps a finite maximum
  if (center) {
    center += k0;
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) {
      x[k] = (x[k] - center[k]) * scale;
      top = x[k] > top ? x[k] : top;
    }
  } else {
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) {
      x[k] *= scale;
      top = x[k] > top ? x[k] : top;
    }
  }
  return top;
}

template <typename A>
void store(Type type, void* row, int64_t k0, int64_t n, const A* x) {
  if (type == F32) {
    float* p = static_cast<float*>(row) + k0;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) p[k] = float(x[k]);
  } else if (type == F64) {
    double* p = static_cast<double*>(row) + k0;
    for (int64_t k = 0; k < n; ++k) p[k] = x[k];
  } else if (type == BF16) {
    uint16_t* p = static_cast<uint16_t*>(row) + k0;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) p[k] = narrow_bf16(float(x[k]));
  } else {
    uint16_t* p = static_cast<uint16_t*>(row) + k0;
    int64_t k = 0;
#ifdef __F16C__
    if (sizeof(A) == 4)
      for (; k + 8 <= n; k += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k),
                         _mm256_cvtps_ph(_mm256_loadu_ps(reinterpret_cast<const float*>(x + k)), 0));
#endif
    for (; k < n; ++k) p[k] = narrow_f16(float(x[k]));
  }
}

// x[k] = exp(x[k] - max), or x[k] itself for probabilities; returns the sum.
template <typename A>
A exponentials(A* x, int64_t n, A max, bool probabilities) {
  A sum = 0;
  if (probabilities) {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += x[k];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
      x[k] = exp_negative(x[k] - max);
      sum += x[k];
    }
  }
  return sum;
}

// a takes in b, its right neighbour.
void merge(State a, State b, int T, int V) {
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      a.dot[t * V + v] = merge_dots(a.dot[t * V + v], a.teacher[t], a.student[v],
                                    b.dot[t * V + v], b.teacher[t], b.student[v]);
  for (int t = 0; t < T; ++t) a.teacher[t] = merge(a.teacher[t], b.teacher[t]);
  for (int v = 0; v < V; ++v) a.student[v] = merge(a.student[v], b.student[v]);
}

template <typename A>
void forward_block(const Distill& d, int64_t b, int64_t k0, int64_t n, A* e, State out) {
  const int T = d.shape.teachers, V = d.shape.views;
  A* z = e + T * BLOCK;
  for (int t = 0; t < T; ++t) {
    const Teacher& teacher = d.teacher[t];
    A top = load<A>(teacher.rows, b, k0, n, static_cast<const A*>(teacher.center),
                    inverse_temperature<A>(d, t), e + t * BLOCK);
    out.teacher[t].max = teacher.probabilities ? 0 : top;
    out.teacher[t].sum = exponentials<A>(e + t * BLOCK, n, top, teacher.probabilities);
  }
  for (int v = 0; v < V; ++v) {
    A top = load<A>(d.student[v], b, k0, n, nullptr, inverse_temperature<A>(d, -1), z), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
      z[k] -= top;
      sum += exp_negative(z[k]);
    }
    out.student[v] = {top, sum};
    for (int t = 0; t < T; ++t) {
      A dot = 0;
      const A* et = e + t * BLOCK;
      if (d.pairs[t * V + v] != 0) {
#pragma omp simd reduction(+ : dot)
        for (int64_t k = 0; k < n; ++k) dot += et[k] * z[k];
      }
      out.dot[t * V + v] = dot;
    }
  }
}

template <typename A>
void forward_item(const Distill& d, int64_t item, double* states) {
  const int T = d.shape.teachers, V = d.shape.views;
  const Tile at = tile_at(d.shape, TILE, item);
  const int64_t size = state_size(d.shape);
  A* scratch = static_cast<A*>(std::malloc((T + 1) * BLOCK * sizeof(A)));
  double* block = static_cast<double*>(std::malloc(size * sizeof(double)));
  State state = state_at(states + item * size, d.shape);
  for (int64_t k = at.begin; k < at.end; k += BLOCK) {
    State to = k == at.begin ? state : state_at(block, d.shape);
    forward_block<A>(d, at.image, k, k + BLOCK < at.end ? BLOCK : at.end - k, scratch, to);
    if (k != at.begin) merge(state, to, T, V);
  }
  std::free(block);
  std::free(scratch);
}

// Calls work(item) for every item; no parallel region for one thread: a forked child would hang.
template <typename Work>
void each(int64_t items, int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < items; ++i) work(i);
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) work(i);
}

template <typename A>
void forward(const Distill& d, const Forward& out) {
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images, cut = tiles(d.shape, TILE), size = state_size(d.shape);
  double* states = static_cast<double*>(std::malloc((B * cut * size + d.targets + 1) * sizeof(double)));
  double* sums = states + B * cut * size;
  each(B * cut, d.threads, [&](int64_t item) { forward_item<A>(d, item, states); });

  A* stats = static_cast<A*>(out.stats);
  for (int i = 0; i < d.targets; ++i) sums[i] = 0;
  for (int64_t b = 0; b < B; ++b) {
    State s = state_at(states + b * cut * size, d.shape);
    for (int64_t i = 1; i < cut; ++i)
      merge(s, state_at(states + (b * cut + i) * size, d.shape), T, V);
    for (int v = 0; v < V; ++v) {
      A* at = stats + student_stats(d.shape, v, b);
      at[0] = A(s.student[v].max);
      at[1] = A(__builtin_log(s.student[v].sum));
    }
    for (int t = 0; t < T; ++t) {
      const Teacher& teacher = d.teacher[t];
      A* at = stats + teacher_stats(d.shape, t, b);
      at[0] = A(s.teacher[t].max);
      at[1] = A(s.teacher[t].sum);
      double rows = 0;
      for (int v = 0; v < V; ++v)
        if (d.pairs[t * V + v] != 0)
          rows += d.pairs[t * V + v] *
                  cross_entropy(s.dot[t * V + v], s.teacher[t], s.student[v], teacher.probabilities);
      sums[teacher.target] += rows * row_weight<A>(teacher, b);
    }
  }
  double loss = 0;
  for (int i = 0; i < d.targets; ++i) {
    double term = B ? sums[i] / B : 0;
    static_cast<A*>(out.terms)[i] = A(term);
    loss += d.weights[i] * term;
  }
  *static_cast<A*>(out.loss) = A(loss);
  std::free(states);
}

// gradient[v] = grad_output / (tau_s B) * (n_v softmax(z_v) - sum_t c_tv q_t)
template <typename A>
void backward_item(const Distill& d, const Backward& io, int64_t item) {
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images, K = d.shape.columns;
  const Tile at = tile_at(d.shape, TILE, item);
  const int64_t b = at.image;
  const A* stats = static_cast<const A*>(io.stats);
  const A inverse = inverse_temperature<A>(d, -1);
  const A scale = *static_cast<const A*>(io.grad_output) * inverse / A(B);
  A* q = static_cast<A*>(std::malloc((T + 2) * BLOCK * sizeof(A)));
  A* z = q + T * BLOCK;
  A* g = z + BLOCK;
  for (int64_t k0 = at.begin; k0 < at.end; k0 += BLOCK) {
    const int64_t n = k0 + BLOCK < at.end ? BLOCK : at.end - k0;
    for (int t = 0; t < T; ++t) {
      const Teacher& teacher = d.teacher[t];
      A* qt = q + t * BLOCK;
      load<A>(teacher.rows, b, k0, n, static_cast<const A*>(teacher.center), inverse_temperature<A>(d, t), qt);
      if (teacher.probabilities) continue;
      const A* row = stats + teacher_stats(d.shape, t, b);
      const A max = row[0], normal = A(1) / row[1];
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) qt[k] = exp_negative(qt[k] - max) * normal;
    }
    for (int v = 0; v < V; ++v) {
      load<A>(d.student[v], b, k0, n, nullptr, inverse, z);
      const A* row = stats + student_stats(d.shape, v, b);
      const A max = row[0], normal = A(mass(d, stats, v, b)) * A(__builtin_exp(-double(row[1]))) * scale;
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) g[k] = exp_negative(z[k] - max) * normal;
      for (int t = 0; t < T; ++t) {
        const A* qt = q + t * BLOCK;
        const A c = A(coefficient<A>(d, t, v, b)) * scale;
        if (c == 0) continue;
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) g[k] -= c * qt[k];
      }
      const int64_t bytes = d.student[v].type == F64 ? 8 : d.student[v].type == F32 ? 4 : 2;
      store<A>(d.student[v].type, static_cast<char*>(io.gradient) + (v * B + b) * K * bytes, k0, n, g);
    }
  }
  std::free(q);
}

template <typename A>
void backward(const Distill& d, const Backward& io) {
  each(d.shape.images * tiles(d.shape, TILE), d.threads,
       [&](int64_t item) { backward_item<A>(d, io, item); });
}

void run_forward(const Distill& d, const Forward& io) {
  d.student[0].type == F64 ? forward<double>(d, io) : forward<float>(d, io);
}

void run_backward(const Distill& d, const Backward& io) {
  d.student[0].type == F64 ? backward<double>(d, io) : backward<float>(d, io);
}

}  // namespace

extern const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL);
const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL) = {MOKD_STRING(MOKD_LEVEL), run_forward, run_backward};

}  // namespace mokd::cpu
