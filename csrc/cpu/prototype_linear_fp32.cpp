// Logits x w^T of fp32 features and prototypes w = g v / |v|, and their gradients: with s = g / |v|
//
//     z = s (x.v)     dx = (s dz) v     dw = dz^T x     dv = s (dw - (dw.v) v / |v|^2)     dg = dw.v / |v|
//
// v is read once a pass as it lies, and w is made nowhere. In forward the prototypes are the rows of the
// product, a few of them against all features, transposed once: what has to be turned then are logits, of
// which there are fewer than numbers of v.
#include "normed.h"
#include "product.h"

namespace mokd::cpu {
namespace {

using Call = PrototypeLinear<float>;

constexpr int ROWS = 6;         // of a product at a time
constexpr int64_t TERMS = 256;  // of one sum: in a longer chain of additions digits get lost
constexpr int L = LANES<float>;

// Into the caches, while something else is worked on.
inline void fetch(const float* at, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / sizeof(float)) __builtin_prefetch(at + k);
}

// [D, columns] from rows of D, zeros behind the last one.
void transpose(const Call& c, int64_t columns, float* to) {
  for (int64_t d = 0; d < c.width; ++d)
    for (int64_t i = 0; i < columns; ++i) to[d * columns + i] = i < c.rows ? c.x[i * c.width + d] : 0;
}

// c = a b, TERMS at a time; `part` has room for c.
void multiply(Product<float> p, int64_t vectors, float* part) {
  const int64_t terms = p.terms;
  for (int64_t j = 0; j < terms; j += TERMS, p.a += TERMS * p.term, p.b += TERMS * p.b_step) {
    p.terms = terms - j < TERMS ? terms - j : TERMS;
    if (!j) {
      product<false>(p, vectors);
      continue;
    }
    Product<float> next = p;
    next.c = part;
    product<false>(next, vectors);
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t k = 0; k < vectors * L; k += L) {
        float* sum = p.c + i * p.c_step + k;
        store(sum, load<Vec<float>>(sum) + load<Vec<float>>(part + i * p.c_step + k));
      }
  }
}

void forward(const Call& c, float* logits) {
  const int64_t D = c.width, K = c.prototypes, columns = (c.rows + L - 1) / L * L;
  const int64_t own = (CHUNK + ROWS) * columns;
  const Buffer turned(D * columns * 4), memory(own * 4 * (c.threads > 1 ? c.threads : 1));
  float* x = reinterpret_cast<float*>(turned.get());
  transpose(c, columns, x);
  parallel(c.threads, (K + CHUNK - 1) / CHUNK, [&](int64_t item, int thread) {
    float* z = reinterpret_cast<float*>(memory.get()) + thread * own;
    const int64_t first = item * CHUNK, count = K - first < CHUNK ? K - first : CHUNK;
    const float* from = (c.w ? c.w : c.v) + first * D;
    float scale[CHUNK];
    for (int64_t k = 0; k < count; k += ROWS) {
      const int64_t rows = count - k < ROWS ? count - k : ROWS;
      fetch(from + (k + CHUNK) * D, rows * D);
      multiply({from + k * D, D, 1, rows, D, x, columns, z + k * columns, columns}, columns / L, z + CHUNK * columns);
      for (int64_t j = k; j < k + rows; ++j) {
        if (c.w) {
          scale[j] = 1;
        } else {
          const float norm = c.norms[first + j] = std::sqrt(dot(from + j * D, from + j * D, D));
          scale[j] = c.g[first + j] / norm;
        }
      }
    }
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t k = 0; k < count; ++k) logits[i * K + first + k] = z[k * columns + i] * scale[k];
  });
}

void backward(const Call& c, const float* grad, const Gradients& to) {
  const int64_t D = c.width, K = c.prototypes, own = 2 * (c.rows * CHUNK + PART * D);
  const Slabs slabs(c);
  const Buffer memory(own * 4 * (c.threads > 1 ? c.threads : 1)), parts(slabs.count * c.rows * D * 4);
  std::vector<double> squares(slabs.count);
  parallel(c.threads, slabs.count, [&](int64_t item, int thread) {
    float* dz = reinterpret_cast<float*>(memory.get()) + thread * own;
    float *scaled = dz + c.rows * CHUNK, *dw = scaled + c.rows * CHUNK;
    float* dx = reinterpret_cast<float*>(parts.get()) + item * c.rows * D;
    std::memset(dx, 0, c.rows * D * 4);
    const int64_t end = (item + 1) * slabs.size < K ? (item + 1) * slabs.size : K;
    for (int64_t first = item * slabs.size; first < end; first += CHUNK) {
      const int64_t count = end - first < CHUNK ? end - first : CHUNK;
      float scale[CHUNK];
      for (int64_t k = 0; k < count; ++k) scale[k] = c.g[first + k] / c.norms[first + k];
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t k = 0; k < count; ++k) {
          const float value = grad[i * K + first + k];
          dz[i * CHUNK + k] = value, scaled[i * CHUNK + k] = value * scale[k];
        }
      product<true, float, float>({scaled, CHUNK, 1, c.rows, count, c.v + first * D, D, dx, D}, D / L);
      for (int64_t k = 0; k < count; k += PART) {
        fetch(c.v + (first + k + CHUNK) * D, PART * D);
        multiply({dz + k, 1, CHUNK, PART, c.rows, c.x, D, dw, D}, D / L, dw + PART * D);
        squares[item] += unnormalise(c, first + k, dw, to);
      }
    }
    stream_fence();
  });
  add_up(c, reinterpret_cast<const float*>(parts.get()), squares, to);
}

}  // namespace

extern const PrototypeLinearKernels<float> MOKD_JOIN(prototype_linear_kernels_, MOKD_LEVEL);
const PrototypeLinearKernels<float> MOKD_JOIN(prototype_linear_kernels_, MOKD_LEVEL) = {forward, backward};

}  // namespace mokd::cpu
