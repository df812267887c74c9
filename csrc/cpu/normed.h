// What products with prototypes g v / |v| have in common, of bf16 and of fp32.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "prototype_linear.h"
#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t CHUNK = 64;  // prototypes between two visits of dx's sums
constexpr int64_t PART = 16;   // prototypes whose dw is there at a time
// Parts of K that sum dx alone, so that bits do not depend on threads: as many, or what memory takes.
constexpr int64_t SLABS = 32, MEMORY = 32 << 20;

struct Slabs {
  int64_t size, count;
  template <typename I>
  explicit Slabs(const PrototypeLinear<I>& c) {
    const int64_t most = std::max(int64_t(2), std::min(SLABS, MEMORY / (c.rows * c.width * 4)));
    size = ((c.prototypes + CHUNK - 1) / CHUNK + most - 1) / most * CHUNK;
    count = (c.prototypes + size - 1) / size;
  }
};

// dv and dg of some prototypes, from their dw. The sum of dv's squares, which costs nothing here and a pass over
// memory later.
template <typename I>
double unnormalise(const PrototypeLinear<I>& c, int64_t first, const float* dw, const Gradients& to) {
  const int64_t D = c.width;
  double squares = 0;
  for (int64_t k = first; k < first + PART; ++k, dw += D) {
    const float *v = c.v + k * D, norm = c.norms[k], along = dot(dw, v, D) / norm;
    to.g[k] = along;
    const float scale = c.g[k] / norm, back = scale * along / norm;
    Vec<float> sum = {};
    for (int64_t d = 0; d < D; d += LANES<float>) {
      const Vec<float> dv = load<Vec<float>>(dw + d) * scale - load<Vec<float>>(v + d) * back;
      stream_vector(to.v + k * D + d, dv);
      sum += dv * dv;
    }
    squares += reduce_add<float>(sum);
  }
  return squares;
}

// dx and the norm of dv from the slabs' parts of them.
template <typename I>
void add_up(const PrototypeLinear<I>& c, const float* parts, const std::vector<double>& squares, const Gradients& to) {
  const int64_t D = c.width, slabs = int64_t(squares.size());
  *to.v_norm = float(std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0)));
  parallel(c.threads, c.rows, [&](int64_t i, int) {
    for (int64_t d = i * D; d < (i + 1) * D; d += LANES<float>) {
      Vec<float> sum = load<Vec<float>>(parts + d);
      for (int64_t s = 1; s < slabs; ++s) sum += load<Vec<float>>(parts + s * c.rows * D + d);
      store(to.x + d, sum);
    }
  });
}

}  // namespace
}  // namespace mokd::cpu
