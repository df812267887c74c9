// Self-attention of bf16 tokens, softmax(q k^T scale) v, and its gradient. Compiled for AVX-512 with its
// products of bf16 alone: sums and exponentials are fp32, and what is multiplied is rounded once.
//
// A head's keys and values are brought into the order of products once. ROWS queries at a time meet all keys,
// so that their scores stay in the caches; nothing of [N, N] is stored but, in backward, BLOCK rows of it.
// A piece of work is a head: the thread count changes no bit.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "pairs.h"
#include "product.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t ROWS = 24, BLOCK = 120;
constexpr double LOG2_E = 1.4426950408889634;

// One head of one image, and where its numbers lie.
struct Head {
  const Attention& a;
  int64_t b, h;
  int64_t d = a.width, N = a.tokens, columns = vectors(N) * L, step = 3 * a.heads * d;
  float rate = float(double(a.scale) * LOG2_E);  // of an exponent to 2
  int64_t at(int64_t which) const { return b * N * step + (which * a.heads + h) * d; }
  const uint16_t* rows(int64_t which) const { return a.qkv + at(which); }  // queries, keys, values
  int64_t out_step() const { return a.heads * d; }
  int64_t out() const { return b * N * a.heads * d + h * d; }
  float* stats() const { return a.stats ? a.stats + (b * a.heads + h) * N : nullptr; }
};

// What a thread works in, cut from one piece of memory.
struct Room {
  char* at;
  template <typename T>
  T* take(int64_t n) {
    T* mine = reinterpret_cast<T*>(at);
    at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return mine;
  }
};

__m512 vec(const float* p) { return _mm512_loadu_ps(p); }
__m512 exp2_of(__m512 x) { return reinterpret_cast<__m512>(exp2_negative(reinterpret_cast<Vec<float>>(x))); }

// c[n][columns] = rows of pairs times a right side.
void scores(const uint16_t* rows, int64_t step, int64_t n, int64_t width, const Pair* b, int64_t columns, float* c) {
  product<false>(Product<float, Pair>{pairs(rows), step / 2, 1, n, width / 2, b, columns, c, columns}, columns / L);
}

// Scores become exponentials in bf16, zeros beside them; returns their sum. top: the largest score.
float exponentials(const float* s, const Head& g, float* top, uint16_t* p) {
  const int64_t columns = g.columns;
  const __mmask16 last = 0xffff >> (columns - g.N);
  __m512 most = _mm512_set1_ps(-FLT_MAX);
  int64_t k = 0;
  for (; k < columns - L; k += L) most = _mm512_max_ps(vec(s + k), most);
  most = _mm512_mask_max_ps(most, last, vec(s + k), most);
  *top = _mm512_reduce_max_ps(most);
  const __m512 rate = _mm512_set1_ps(g.rate), base = _mm512_set1_ps(*top);
  __m512 sum = _mm512_setzero_ps();
  for (k = 0; k < columns; k += L) {
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_sub_ps(vec(s + k), base), rate));
    if (k + L == columns) e = _mm512_maskz_mov_ps(last, e);
    sum = _mm512_add_ps(sum, e);
    store_bf16(p + k, e);
  }
  return _mm512_reduce_add_ps(sum);
}

void forward_head(const Head& g, uint16_t* out, Room room) {
  const int64_t d = g.d, N = g.N, columns = g.columns;
  Pair* keys = room.take<Pair>(d / 2 * columns);
  Pair* values = room.take<Pair>((N + 1) / 2 * d);
  float* s = room.take<float>(ROWS * columns);
  uint16_t* p = room.take<uint16_t>(ROWS * columns);
  float* o = room.take<float>(ROWS * d);
  float sums[ROWS];
  transposed(g.rows(1), g.step, N, d, keys);
  paired(g.rows(2), g.step, N, d, values);
  for (int64_t m = 0; m < N; m += ROWS) {
    const int64_t n = std::min(ROWS, N - m);
    scores(g.rows(0) + m * g.step, g.step, n, d, keys, columns, s);
    for (int64_t i = 0; i < n; ++i) {
      float top;
      sums[i] = exponentials(s + i * columns, g, &top, p + i * columns);
      if (g.a.stats) g.stats()[m + i] = top * g.rate + std::log2(sums[i]);
    }
    product<false>(Product<float, Pair>{pairs(p), columns / 2, 1, n, (N + 1) / 2, values, d, o, d}, d / L);
    for (int64_t i = 0; i < n; ++i) {
      const __m512 share = _mm512_set1_ps(1 / sums[i]);
      uint16_t* to = out + g.out() + (m + i) * g.out_step();
      for (int64_t k = 0; k < d; k += L) store_bf16(to + k, _mm512_mul_ps(vec(o + i * d + k), share));
    }
  }
}

float dot(const uint16_t* x, const uint16_t* y, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < d; k += 2 * L) {
    const __mmask32 own = d - k < 2 * L ? 0xffff : 0xffffffff;
    const auto both = [&](const uint16_t* at) { return (__m512bh)_mm512_maskz_loadu_epi16(own, at + k); };
    sum = _mm512_dpbf16_ps(sum, both(x), both(y));
  }
  return _mm512_reduce_add_ps(sum);
}

// Two rows of numbers to pairs along the rows.
inline void store_pairs(Pair* to, __m512 first, __m512 second) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
}

struct Gradients {
  uint16_t* ds;       // [ROWS][columns]
  Pair *shares, *dst;  // [BLOCK / 2][columns], pairs along the queries
};

// Two rows of scores s and of dp = grad . v become shares p and ds = p (dp - delta); of an odd last row the
// second is none.
void unscore(const Head& g, const float* s, const float* dp, const float* stats, const float* delta, bool both,
             uint16_t* ds, Pair* shares, Pair* dst) {
  const int64_t columns = g.columns, N = g.N;
  const __m512 rate = _mm512_set1_ps(g.rate);
  for (int64_t k = 0; k < columns; k += L) {
    const __mmask16 own = N - k < L ? (1u << (N - k)) - 1 : 0xffff;
    __m512 p[2], e[2];
    for (int r = 0; r < 2; ++r) {
      if (r && !both) {
        p[r] = e[r] = _mm512_setzero_ps();
        continue;
      }
      // Of large scores the exponent is as coarse as they are: no share is more than 1.
      const __m512 e2 = _mm512_fmsub_ps(vec(s + r * columns + k), rate, _mm512_set1_ps(stats[r]));
      p[r] = _mm512_maskz_mov_ps(own, exp2_of(_mm512_min_ps(_mm512_setzero_ps(), e2)));
      e[r] = _mm512_maskz_mul_ps(own, p[r], _mm512_sub_ps(vec(dp + r * columns + k), _mm512_set1_ps(delta[r])));
      store_bf16(ds + r * columns + k, e[r]);
    }
    store_pairs(shares + k, p[0], p[1]);
    store_pairs(dst + k, e[0], e[1]);
  }
}

void write(const Head& g, const float* from, int64_t n, float scale, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < g.d; k += L)
      store_bf16(to + i * g.step + k, _mm512_mul_ps(vec(from + i * g.d + k), _mm512_set1_ps(scale)));
}

void backward_head(const Head& g, const uint16_t* out, const uint16_t* grad, uint16_t* for_qkv, Room room) {
  const int64_t d = g.d, N = g.N, columns = g.columns;
  Pair* keys = room.take<Pair>(d / 2 * columns);
  Pair* values = room.take<Pair>(d / 2 * columns);
  Pair* key_rows = room.take<Pair>((N + 1) / 2 * d);
  Pair* queries = room.take<Pair>(BLOCK / 2 * d);
  Pair* grads = room.take<Pair>(BLOCK / 2 * d);
  float* s = room.take<float>(ROWS * columns);
  float* dp = room.take<float>(ROWS * columns);
  uint16_t* ds = room.take<uint16_t>(ROWS * columns);
  Pair* shares = room.take<Pair>(BLOCK / 2 * columns);
  Pair* dst = room.take<Pair>(BLOCK / 2 * columns);
  float* dq = room.take<float>(ROWS * d);
  float* dk = room.take<float>(N * d);
  float* dv = room.take<float>(N * d);
  const int64_t gs = g.out_step();
  const uint16_t *q = g.rows(0), *dout = grad + g.out(), *o = out + g.out();
  const float* stats = g.stats();
  transposed(g.rows(1), g.step, N, d, keys);
  transposed(g.rows(2), g.step, N, d, values);
  paired(g.rows(1), g.step, N, d, key_rows);
  std::memset(dk, 0, N * d * sizeof(float));
  std::memset(dv, 0, N * d * sizeof(float));
  for (int64_t m0 = 0; m0 < N; m0 += BLOCK) {
    const int64_t block = std::min(BLOCK, N - m0);
    paired(q + m0 * g.step, g.step, block, d, queries);
    paired(dout + m0 * gs, gs, block, d, grads);
    for (int64_t m = m0; m < m0 + block; m += ROWS) {
      const int64_t n = std::min(ROWS, m0 + block - m);
      scores(q + m * g.step, g.step, n, d, keys, columns, s);
      scores(dout + m * gs, gs, n, d, values, columns, dp);
      for (int64_t i = 0; i < n; i += 2) {
        const bool both = i + 1 < n;
        float delta[2] = {};
        for (int64_t r = 0; r < 1 + both; ++r) delta[r] = dot(dout + (m + i + r) * gs, o + (m + i + r) * gs, d);
        const int64_t line = (m - m0 + i) / 2 * columns;
        unscore(g, s + i * columns, dp + i * columns, stats + m + i, delta, both, ds + i * columns, shares + line,
                dst + line);
      }
      product<false>(Product<float, Pair>{pairs(ds), columns / 2, 1, n, (N + 1) / 2, key_rows, d, dq, d}, d / L);
      write(g, dq, n, g.a.scale, for_qkv + g.at(0) + m * g.step);
    }
    const int64_t terms = (block + 1) / 2;
    product<true>(Product<float, Pair>{shares, 1, columns, N, terms, grads, d, dv, d}, d / L);
    product<true>(Product<float, Pair>{dst, 1, columns, N, terms, queries, d, dk, d}, d / L);
  }
  write(g, dk, N, g.a.scale, for_qkv + g.at(1));
  write(g, dv, N, 1, for_qkv + g.at(2));
}

int64_t bytes(const Attention& a, bool backward) {
  const int64_t d = a.width, N = a.tokens + 1, columns = vectors(N) * L;
  const int64_t forward = 2 * columns * d + 2 * N * d + 6 * ROWS * columns + 4 * ROWS * d;
  const int64_t more = 2 * columns * d + 4 * BLOCK * d + 8 * ROWS * columns + 4 * BLOCK * columns + 8 * N * d;
  return (forward + (backward ? more : 0) + 16 * 64) / 64 * 64;
}

template <typename Work>
void each_head(const Attention& a, bool backward, const Work& work) {
  const int64_t size = bytes(a, backward);
  const Buffer memory(size * (a.threads > 1 ? a.threads : 1));
  parallel(a.threads, a.images * a.heads, [&](int64_t item, int thread) {
    work(Head{a, item / a.heads, item % a.heads}, Room{memory.get() + thread * size});
  });
}

void forward(const Attention& a, uint16_t* out) {
  each_head(a, false, [&](const Head& g, Room room) { forward_head(g, out, room); });
}

void backward(const Attention& a, const uint16_t* out, const uint16_t* grad, uint16_t* for_qkv) {
  each_head(a, true, [&](const Head& g, Room room) { backward_head(g, out, grad, for_qkv, room); });
}

}  // namespace

extern const AttentionKernels attention_kernels_bf16;
const AttentionKernels attention_kernels_bf16 = {forward, backward};

}  // namespace mokd::cpu
