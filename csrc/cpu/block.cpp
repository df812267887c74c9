// GELU (of the error function) and LayerNorm for bf16, with what stands beside them in a transformer block:
//
//     gelu(u) = u P(u)                      gelu'(u) = P(u) + u p(u),  p the normal density, P its integral
//     s = x + y,  n = (s - mean) scale w + b,  scale = 1 / sqrt(variance + eps)
//     ds += scale (dn w - mean(dn w) - (s - mean) scale mean(dn w (s - mean) scale))
//
// Each is one pass over memory: numbers are widened in registers, a row's sums are made while it is in L1.
// Sums over rows are made in groups of fixed size and joined in order: bits do not depend on the threads.
#include "block.h"

#include <cmath>
#include <type_traits>

#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int L = LANES<float>;
constexpr int64_t GROUP = 32;  // rows

// f(column, how many from there) over n columns, SIZE at a time; of whole ones the count is a constant.
template <int64_t SIZE = L, typename F>
inline void each_vector(int64_t n, const F& f) {
  int64_t k = 0;
  for (; k + SIZE <= n; k += SIZE) f(k, std::integral_constant<int64_t, SIZE>());
  if (k < n) f(k, n - k);
}

inline Vec<float> wide(const uint16_t* p, std::integral_constant<int64_t, L>) { return widen_bf16(load<Half>(p)); }
inline Vec<float> wide(const uint16_t* p, int64_t count) {
  Half h = {};
  std::memcpy(&h, p, count * 2);
  return widen_bf16(h);
}

inline Vec<float> wide(const float* p, std::integral_constant<int64_t, L>) { return load<Vec<float>>(p); }
inline Vec<float> wide(const float* p, int64_t count) { return load_tail(p, count, 0.0f); }

inline void put(uint16_t* p, Vec<float> v, int64_t count) {
  const Half h = narrow_bf16(v);
  std::memcpy(p, &h, count * 2);
}

inline void put(float* p, Vec<float> v, int64_t count) { std::memcpy(p, &v, count * 4); }

// 1 / x for x of at least 1, to 2^-14 or better: bf16 wants no more, and a division takes as long as all the
// rest of a GELU.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm256_rcp_ps(reinterpret_cast<__m256>(x)));
  return r * (2.0f - x * r);
#elif defined(__SSE2__)
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm_rcp_ps(reinterpret_cast<__m128>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// 2^x for x <= 0 as exp2_negative, but with a relative error of 3e-6.
inline Vec<float> exp2_short(Vec<float> x) {
#if defined(__AVX512DQ__)
  const __m512 all = reinterpret_cast<__m512>(x);
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm512_reduce_ps(all, _MM_FROUND_NO_EXC));
  const __m512 power = _mm512_roundscale_ps(all, _MM_FROUND_NO_EXC);
  Vec<float> p = r * 9.58284692e-3f + 5.59064354e-2f;
  p = p * r + 2.40240988e-1f;
  p = p * r + 6.93124192e-1f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), power));
#else
  return exp2_negative(x);
#endif
}

inline Vec<float> magnitude(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(x) & 0x7fffffff);
}

// min(high, x), and NaN for NaN.
inline Vec<float> at_most(float high, Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(high), reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec<float>>(_mm256_min_ps(_mm256_set1_ps(high), reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec<float>>(_mm_min_ps(_mm_set1_ps(high), reinterpret_cast<__m128>(x)));
#else
  return x > high ? Vec<float>{} + high : x;
#endif
}

// gelu(u) = max(u, 0) - a P(-a) with a = |u|, P(-a) = exp(-a^2 / 2) Q(t) and t = 1 / (1 + 0.31 a): Q's relative
// error is 5e-6 up to where P leaves fp32 (least squares, reweighted to the smallest maximum). Beyond 12, a is
// 12: P is 2e-33 there, and soon a subnormal number, of which each operation takes a hundred times as long.
struct Normal {
  Vec<float> a, tail, bell;  // a, P(-a), exp(-a^2 / 2)
};

inline Normal normal(Vec<float> u) {
  const Vec<float> a = at_most(12.0f, magnitude(u)), t = reciprocal(a * 0.31f + 1.0f);
  const Vec<float> bell = exp2_short(a * a * -0.72134752f);
  Vec<float> q = t * -0.07392754f + 0.18044538f;
  q = q * t + 0.01575075f;
  q = q * t + 0.13342618f;
  q = q * t + 0.12044232f;
  q = q * t + 0.12386056f;
  return {a, q * (t * bell), bell};
}

inline Vec<float> gelu_of(Vec<float> u, const Normal& n) { return at_least(0.0f, u) - n.a * n.tail; }

inline Vec<float> slope_of(Vec<float> u, const Normal& n) {
  const Vec<float> below = n.tail - n.a * n.bell * 0.39894228f;  // gelu'(-a) = 1 - gelu'(a)
  return u < 0.0f ? below : 1.0f - below;
}

// Numbers of bf16, two vectors of them: every other one from the first on, and the rest. A whole pair is
// taken apart and joined in registers, of a row's end there is a copy in between.
struct Pair {
  Vec<float> first, second;
  static constexpr int64_t SIZE = 2 * L;
  Pair(Vec<float> v, Vec<float> w) : first(v), second(w) {}
  Pair(const uint16_t* p, int64_t count) {
    Bits both = {};
    std::memcpy(&both, p, count * 2);
    first = reinterpret_cast<Vec<float>>(both << 16);
    second = reinterpret_cast<Vec<float>>(both & 0xffff0000);
  }
  void put(uint16_t* p, int64_t count) const {
    const Bits both = PairedBf16::join(first, second);
    std::memcpy(p, &both, count * 2);
  }
};

// work(first row, end) for every group of rows.
template <typename Work>
void each_group(int64_t rows, int threads, const Work& work) {
  parallel(threads, (rows + GROUP - 1) / GROUP, [&](int64_t group, int) {
    const int64_t end = (group + 1) * GROUP;
    work(group, group * GROUP, end < rows ? end : rows);
  });
}

// Sums over rows: each group's `count` sums of `width`, with room for whole pairs; they start as 0.
class Sums {
 public:
  Sums(int64_t rows, int64_t width, int64_t count)
      : groups((rows + GROUP - 1) / GROUP), width(width), room((width + Pair::SIZE) / Pair::SIZE * Pair::SIZE),
        size(room * count), memory(groups * size * int64_t(sizeof(float))) {}
  float* of(int64_t group) const {
    float* found = reinterpret_cast<float*>(memory.get()) + group * size;
    std::memset(found, 0, size * sizeof(float));
    return found;
  }
  // A pair's place is its columns', but within it stand the first vector and then the second.
  static void add(float* sum, const Pair& x) {
    store(sum, load<Vec<float>>(sum) + x.first), store(sum + L, load<Vec<float>>(sum + L) + x.second);
  }
  // The sum with number i, of columns in order or as `add` has them.
  void join(int64_t i, float* to, bool pairs = false) const {
    float* all = reinterpret_cast<float*>(memory.get()) + i * room;
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t k = 0; k < room; ++k) all[k] += all[g * size + k];
    for (int64_t k = 0; k < width; ++k) {
      const int64_t within = k % Pair::SIZE;
      to[k] = groups ? all[pairs ? k - within + within / 2 + within % 2 * L : k] : 0;
    }
  }
  const int64_t groups, width, room;

 private:
  const int64_t size;
  const Buffer memory;
};

void gelu(const Gelu& c, const uint16_t* u, uint16_t* g) {
  each_group(c.rows, c.threads, [&](int64_t, int64_t first, int64_t end) {
    const int64_t at = first * c.width;
    each_vector<Pair::SIZE>((end - first) * c.width, [&](int64_t k, auto count) {
      const Pair x(u + at + k, count);
      const Normal n = normal(x.first), m = normal(x.second);
      Pair(gelu_of(x.first, n), gelu_of(x.second, m)).put(g + at + k, count);
    });
  });
}

void gelu_backward(const Gelu& c, const uint16_t* u, const uint16_t* dg, uint16_t* du, uint16_t* g, float* sums) {
  const Sums parts(c.rows, c.width, 1);
  each_group(c.rows, c.threads, [&](int64_t group, int64_t first, int64_t end) {
    float* sum = parts.of(group);
    for (int64_t row = first; row < end; ++row) {
      const int64_t at = row * c.width;
      each_vector<Pair::SIZE>(c.width, [&](int64_t k, auto count) {
        const Pair x(u + at + k, count), d(dg + at + k, count);
        const Normal n = normal(x.first), m = normal(x.second);
        const Pair v(d.first * slope_of(x.first, n), d.second * slope_of(x.second, m));
        Pair(gelu_of(x.first, n), gelu_of(x.second, m)).put(g + at + k, count);
        v.put(du + at + k, count);
        Sums::add(sum + k, v);
      });
    }
  });
  parts.join(0, sums, true);
}

void sum_rows(const Gelu& c, const uint16_t* x, float* sums) {
  const Sums parts(c.rows, c.width, 1);
  each_group(c.rows, c.threads, [&](int64_t group, int64_t first, int64_t end) {
    float* sum = parts.of(group);
    for (int64_t row = first; row < end; ++row)
      each_vector<Pair::SIZE>(c.width, [&](int64_t k, auto count) {
        Sums::add(sum + k, Pair(x + row * c.width + k, count));
      });
  });
  parts.join(0, sums, true);
}

template <typename Y>
void add_norm_rows(const AddNorm& c, const Y* y, float* sum, uint16_t* normed, NormStats* stats) {
  const int64_t width = c.width;
  each_group(c.rows, c.threads, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const float *x = c.x + row % c.period * width, *s = x;
      Vec<float> total = {}, squares = {};
      if (y) {
        float* to = sum + row * width;
        each_vector(width, [&](int64_t k, auto count) {
          const Vec<float> v = wide(x + k, count) + wide(y + row * width + k, count);
          total += v;
          put(to + k, v, count);
        });
        s = to;
      } else {
        each_vector(width, [&](int64_t k, auto count) { total += wide(x + k, count); });
      }
      const float mean = reduce_add<float>(total) / float(width);
      each_vector(width, [&](int64_t k, auto count) {
        Vec<float> v = wide(s + k, count) - mean;
        if constexpr (!std::is_same_v<decltype(count), std::integral_constant<int64_t, L>>)
          for (int64_t i = count; i < L; ++i) v[i] = 0;
        squares += v * v;
      });
      const float scale = 1.0f / std::sqrt(reduce_add<float>(squares) / float(width) + c.eps);
      stats[row] = {mean, scale};
      each_vector(width, [&](int64_t k, auto count) {
        const Vec<float> v = (wide(s + k, count) - mean) * scale;
        put(normed + row * width + k, v * wide(c.weight + k, count) + wide(c.bias + k, count), count);
      });
    }
  });
}

void add_norm(const AddNorm& c, float* sum, uint16_t* normed, NormStats* stats) {
  c.type == F32 ? add_norm_rows(c, static_cast<const float*>(c.y), sum, normed, stats)
                : add_norm_rows(c, static_cast<const uint16_t*>(c.y), sum, normed, stats);
}

void add_norm_backward(const AddNorm& c, const NormStats* stats, const float* dsum, const uint16_t* dnormed,
                       float* dx, uint16_t* dy, float* dweight, float* dbias) {
  const int64_t width = c.width;
  const Sums parts(c.rows, width, 2);
  each_group(c.rows, c.threads, [&](int64_t group, int64_t first, int64_t end) {
    float *for_weight = parts.of(group), *for_bias = for_weight + parts.room;
    for (int64_t row = first; row < end; ++row) {
      const int64_t at = row * width;
      const float mean = stats[row].mean, scale = stats[row].scale;
      Vec<float> all = {}, along = {};
      each_vector(width, [&](int64_t k, auto count) {
        const Vec<float> d = wide(dnormed + at + k, count), v = (wide(c.x + at + k, count) - mean) * scale;
        const Vec<float> weighted = d * wide(c.weight + k, count);  // 0 beyond the row
        all += weighted, along += weighted * v;
        put(for_weight + k, wide(for_weight + k, count) + d * v, count);
        put(for_bias + k, wide(for_bias + k, count) + d, count);
      });
      const float shift = reduce_add<float>(all) / float(width), back = reduce_add<float>(along) / float(width);
      each_vector(width, [&](int64_t k, auto count) {
        const Vec<float> v = (wide(c.x + at + k, count) - mean) * scale;
        Vec<float> d = (wide(dnormed + at + k, count) * wide(c.weight + k, count) - shift - v * back) * scale;
        if (dsum) d += wide(dsum + at + k, count);
        put(dx + at + k, d, count);
        if (dy) put(dy + at + k, d, count);
      });
    }
  });
  parts.join(0, dweight);
  parts.join(1, dbias);
}

}  // namespace

extern const BlockKernels MOKD_JOIN(block_kernels_, MOKD_LEVEL);
const BlockKernels MOKD_JOIN(block_kernels_, MOKD_LEVEL) = {gelu, gelu_backward, add_norm, add_norm_backward,
                                                             sum_rows};

}  // namespace mokd::cpu
