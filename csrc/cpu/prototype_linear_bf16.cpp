// Logits x w^T of bf16 features and prototypes w = g v / |v|, and their gradients
//
//     dx = ds w     dw = ds^T x     dv = (g / |v|) (dw - (dw.v) v / |v|^2)     dg = dw.v / |v|
//
// v is read once a pass; w, rounded to bf16, and dw, in fp32, are made a few rows at a time and stay in
// the caches. All three products are one: instructions take pairs of neighbouring terms, a's by
// broadcast and b's from panels of 32 columns. This file is compiled for AVX512-BF16 alone.
#include "normed.h"
#include "pairs.h"

namespace mokd::cpu {
namespace {

constexpr int PANEL = 32;      // columns of a product at a time: two registers
constexpr int HEIGHT = 12;     // rows of it at most: 24 sums

using Call = PrototypeLinear<uint16_t>;

// c[i][:] = or += sum_p a(i, p) . b[p][:], the pair a(i, p) at a + i * row + p * term; in fp32.
struct Product {
  const uint16_t* a;
  int64_t row, term;
  int64_t rows, terms;
  const Pair* b;  // [panels][terms][PANEL]
  float* c;
  int64_t c_step;
};

// Bytes that are read next. They are fetched while a product runs: the processor would not begin before
// they are asked for.
struct Next {
  const void* at;
  int64_t bytes;
};

inline __m512 multiply(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// `lines` of 64 bytes are fetched from `next` on with each term.
template <int R, bool ADD>
inline __attribute__((always_inline)) void block(const Product& p, int64_t i, const char* next, int lines) {
  const char* a = reinterpret_cast<const char*>(p.a + i * p.row);
  const Pair* b = p.b;
  float* c = p.c + i * p.c_step;
  __m512 sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < 2; ++u) sum[r][u] = ADD ? _mm512_loadu_ps(c + r * p.c_step + 16 * u) : _mm512_setzero_ps();
  for (int64_t j = 0; j < p.terms; ++j, a += 2 * p.term, b += PANEL) {
    for (int n = 0; n < lines; ++n, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    const __m512i first = _mm512_loadu_si512(b), second = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, a + 2 * r * p.row, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair);
      sum[r][0] = multiply(sum[r][0], left, first), sum[r][1] = multiply(sum[r][1], left, second);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < 2; ++u) _mm512_storeu_ps(c + r * p.c_step + 16 * u, sum[r][u]);
}

template <int R, bool ADD>
void blocks(const Product& p, int64_t i, int64_t rows, const char* next, int lines) {
  if (rows == R) return block<R, ADD>(p, i, next, lines);
  if constexpr (R > 1) blocks<R - 1, ADD>(p, i, rows, next, lines);
}

// Blocks of rows as equal as can be: few sums would wait for each other.
template <bool ADD>
void multiply(Product p, int64_t panels, Next then = {nullptr, 0}) {
  const int64_t count = (p.rows + HEIGHT - 1) / HEIGHT, steps = count * panels * p.terms;
  const int lines = int((then.bytes / 64 + steps - 1) / steps);
  const char *next = static_cast<const char*>(then.at), *end = next + then.bytes;
  for (int64_t w = 0; w < panels; ++w, p.b += p.terms * PANEL, p.c += PANEL)
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = p.rows * n / count;
      blocks<HEIGHT, ADD>(p, i, p.rows * (n + 1) / count - i, next, next < end ? lines : 0);
      next += p.terms * lines * 64;
    }
}

// 32 numbers, rounded to nearest.
inline __m512i bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// 16 rows of 16 pairs, transposed into half a panel.
inline void transpose_into(const uint16_t* a, int64_t step, Pair* to) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(a + i * step);
  transpose(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * PANEL, r[i]);
}

// A row g v / |v| in bf16.
void normalised(const float* v, float scale, int64_t width, uint16_t* to) {
  for (int64_t k = 0; k < width; k += 32)
    store(to + k, bf16(_mm512_loadu_ps(v + k) * scale, _mm512_loadu_ps(v + k + 16) * scale));
}

void forward(const Call& c, uint16_t* logits) {
  const int64_t D = c.width, panel = D * PANEL * 2, rounded = 16 * D * 2, sums = c.rows * PANEL * 4;
  const int threads = c.threads > 1 ? c.threads : 1;
  const Buffer memory((panel + rounded + sums) * threads);
  parallel(c.threads, c.prototypes / PANEL, [&](int64_t item, int thread) {
    char* own = memory.get() + (panel + rounded + sums) * thread;
    Pair* b = reinterpret_cast<Pair*>(own);
    uint16_t* made = reinterpret_cast<uint16_t*>(own + panel);
    float* sum = reinterpret_cast<float*>(own + panel + rounded);
    for (int half = 0; half < 2; ++half) {
      const int64_t first = item * PANEL + 16 * half;
      if (!c.w)
        for (int64_t k = first; k < first + 16; ++k) {
          const float* v = c.v + k * D;
          c.norms[k] = std::sqrt(dot(v, v, D));
          normalised(v, c.g[k] / c.norms[k], D, made + (k - first) * D);
        }
      const uint16_t* w = c.w ? c.w + first * D : made;
      for (int64_t d = 0; d < D; d += 32) transpose_into(w + d, D, b + d / 2 * PANEL + 16 * half);
    }
    const int64_t done = (item + 1) * PANEL * D, size = PANEL * D;
    const Next next = c.w ? Next{c.w + done, size * 2} : Next{c.v + done, size * 4};
    multiply<false>({c.x, D, 2, c.rows, D / 2, b, sum, PANEL}, 1, next);
    for (int64_t i = 0; i < c.rows; ++i) {
      const __m512 low = _mm512_loadu_ps(sum + i * PANEL), high = _mm512_loadu_ps(sum + i * PANEL + 16);
      store(logits + i * c.prototypes + item * PANEL, bf16(low, high));
    }
  });
}

// Where a slab's pieces lie in a thread's memory.
struct Room {
  int64_t pairs, two, grads, dw, bytes;
  explicit Room(const Call& c)
      : pairs(CHUNK * c.width * 2),
        two(2 * c.width * 2),
        grads((c.rows + 1) / 2 * CHUNK * 4),
        dw(PART * c.width * 4),
        bytes(pairs + two + grads + dw) {}
};

void backward(const Call& c, const uint16_t* grad, const Gradients& to) {
  const int64_t D = c.width, K = c.prototypes, panels = D / PANEL, terms = (c.rows + 1) / 2;
  const Slabs slabs(c);
  const int threads = c.threads > 1 ? c.threads : 1;
  const Room room(c);
  const Buffer memory(room.bytes * threads), x_pairs(terms * D * 4), parts(slabs.count * c.rows * D * 4);
  std::vector<double> squares(slabs.count);
  Pair* xp = reinterpret_cast<Pair*>(x_pairs.get());
  paired(c.x, D, c.rows, D, [&](int64_t p, int64_t d) { return xp + (d / PANEL * terms + p) * PANEL + d % PANEL; });
  parallel(c.threads, slabs.count, [&](int64_t item, int thread) {
    char* own = memory.get() + room.bytes * thread;
    Pair *b = reinterpret_cast<Pair*>(own), *gp = reinterpret_cast<Pair*>(own + room.pairs + room.two);
    uint16_t* two = reinterpret_cast<uint16_t*>(own + room.pairs);
    float* dw = reinterpret_cast<float*>(own + room.pairs + room.two + room.grads);
    float* dx = reinterpret_cast<float*>(parts.get()) + item * c.rows * D;
    std::memset(dx, 0, c.rows * D * 4);
    const int64_t end = (item + 1) * slabs.size < K ? (item + 1) * slabs.size : K;
    for (int64_t k0 = item * slabs.size; k0 < end; k0 += CHUNK) {
      const int64_t count = end - k0 < CHUNK ? end - k0 : CHUNK;
      for (int64_t k = 0; k < count; k += 2) {
        for (int i = 0; i < 2; ++i)
          normalised(c.v + (k0 + k + i) * D, c.g[k0 + k + i] / c.norms[k0 + k + i], D, two + i * D);
        paired(two, D, 2, D, [&](int64_t, int64_t d) {
          return b + (d / PANEL * (count / 2) + k / 2) * PANEL + d % PANEL;
        });
      }
      multiply<true>({grad + k0, K, 2, c.rows, count / 2, b, dx, D}, panels, {c.v + (k0 + count) * D, CHUNK * D * 4});
      paired(grad + k0, K, c.rows, count, [&](int64_t p, int64_t k) { return gp + p * CHUNK + k; });
      for (int64_t k = 0; k < count; k += PART) {
        multiply<false>({reinterpret_cast<uint16_t*>(gp + k), 2, 2 * CHUNK, PART, terms, xp, dw, D}, panels);
        squares[item] += unnormalise(c, k0 + k, dw, to);
      }
    }
    stream_fence();
  });
  add_up(c, reinterpret_cast<const float*>(parts.get()), squares, to);
}

}  // namespace

extern const PrototypeLinearKernels<uint16_t> prototype_linear_kernels_bf16;
const PrototypeLinearKernels<uint16_t> prototype_linear_kernels_bf16 = {forward, backward};

}  // namespace mokd::cpu
