// The prototypes w = g v / |v|, row by row, in a type of 16 bits, and their gradient
//
//     dv = (g / |v|) (dw - (dw.v) v / |v|^2)     dg = dw.v / |v|
//
// with one pass over the matrices each: a row is read from memory once and stays in L1 for the rest. What
// is written is read again much later, so it goes around the caches.
#include "prototypes.h"

#include <cmath>

#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t ITEM = 64;  // rows that a thread takes at a time
constexpr int L = LANES<float>;

// work(row, room for a row) for every row.
template <typename Call, typename Work>
void each_row(const Call& c, const Work& work) {
  const int64_t room = (c.width + 2 * L) / L * L;
  const Buffer memory(room * int64_t(sizeof(float)) * (c.threads > 1 ? c.threads : 1));
  parallel(c.threads, (c.rows + ITEM - 1) / ITEM, [&](int64_t item, int thread) {
    float* own = reinterpret_cast<float*>(memory.get()) + thread * room;
    const int64_t end = (item + 1) * ITEM < c.rows ? (item + 1) * ITEM : c.rows;
    for (int64_t row = item * ITEM; row < end; ++row) work(row, own);
    stream_fence();
  });
}

void weight_norm(const WeightNorm& c, void* w) {
  each_row(c, [&](int64_t row, float* own) {
    const float* v = c.v + row * c.width;
    const float norm = c.norms[row] = std::sqrt(dot(v, v, c.width)), scale = c.g[row] / norm;
    int64_t k = 0;
    for (; k + L <= c.width; k += L) store(own + k, load<Vec<float>>(v + k) * scale);
    for (; k < c.width; ++k) own[k] = v[k] * scale;
    narrow(c.type, c.width, own);
    stream(static_cast<char*>(w) + row * c.width * 2, own, c.width * 2);
  });
}

void weight_norm_backward(const WeightNorm& c, const void* grad, float* for_v, float* for_g) {
  const Rows rows = {grad, c.type, c.width, 1};
  each_row(c, [&](int64_t row, float* own) {
    const float *v = c.v + row * c.width, *dw = values<float>(rows, row, 0, c.width, own);
    const float norm = c.norms[row], along = dot(dw, v, c.width) / norm;
    for_g[row] = along;
    const float scale = c.g[row] / norm, back = scale * along / norm;
    int64_t k = 0;
    for (; k + L <= c.width; k += L)
      store(own + k, load<Vec<float>>(dw + k) * scale - load<Vec<float>>(v + k) * back);
    for (; k < c.width; ++k) own[k] = dw[k] * scale - v[k] * back;
    stream(for_v + row * c.width, own, c.width * 4);
  });
}

void matvec(const Matvec& c) {
  const Rows rows = {c.matrix, c.type, c.width, 1};
  each_row(c, [&](int64_t row, float* own) {
    c.found[row] = dot(values<float>(rows, row, 0, c.width, own), c.vector, c.width);
  });
}

}  // namespace

extern const PrototypeKernels MOKD_JOIN(prototype_kernels_, MOKD_LEVEL);
const PrototypeKernels MOKD_JOIN(prototype_kernels_, MOKD_LEVEL) = {weight_norm, weight_norm_backward, matvec};

}  // namespace mokd::cpu
