// Each gradient's own L2 norm, and its scaling where that exceeds a maximum: one pass over the gradients,
// and a second over those alone that are to be scaled. Blocks of fixed size are summed by themselves, so
// that the bits of a norm do not depend on the threads.
#include "clip.h"

#include <cmath>
#include <vector>

#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t BLOCK = 1 << 14;  // numbers: 64 KiB
constexpr int64_t CHAIN = 1 << 10;  // numbers that are added up in fp32
constexpr int64_t AHEAD = 1 << 9;   // numbers that are fetched before they are needed
constexpr int L = LANES<float>;

double sum_of_squares(const float* x, int64_t n) {
  double total = 0;
  for (int64_t from = 0; from < n; from += CHAIN) {
    const int64_t end = from + CHAIN < n ? from + CHAIN : n;
    Vec<float> sum[4] = {};
    int64_t k = from;
    for (; k + 4 * L <= end; k += 4 * L)
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(x + k + i * L + AHEAD);
        const Vec<float> v = load<Vec<float>>(x + k + i * L);
        sum[i] += v * v;
      }
    for (; k < end; k += L) {
      const Vec<float> v = load_tail(x + k, end - k < L ? end - k : L, 0.0f);
      sum[0] += v * v;
    }
    total += reduce_add<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

struct Block {
  int64_t grad, begin, size;
};

void make_norms(const Clip& c, const std::vector<Block>& blocks) {
  std::vector<double> sums(blocks.size());
  parallel(c.threads, int64_t(blocks.size()), [&](int64_t b, int) {
    sums[b] = sum_of_squares(c.grads[blocks[b].grad] + blocks[b].begin, blocks[b].size);
  });
  std::vector<double> squares(c.count);
  for (size_t b = 0; b < blocks.size(); ++b) squares[blocks[b].grad] += sums[b];
  for (int64_t i = 0; i < c.count; ++i) c.norms[i] = float(std::sqrt(squares[i]));
}

void clip(const Clip& c) {
  std::vector<Block> blocks;
  for (int64_t i = 0; i < c.count; ++i)
    for (int64_t k = 0; k < c.sizes[i]; k += BLOCK)
      blocks.push_back({i, k, k + BLOCK < c.sizes[i] ? BLOCK : c.sizes[i] - k});
  if (!c.known) make_norms(c, blocks);
  if (std::isinf(c.max_norm)) return;
  parallel(c.threads, int64_t(blocks.size()), [&](int64_t b, int) {
    const Block& block = blocks[b];
    const float scale = clip_scale(c.norms[block.grad], c.max_norm);
    if (scale == 1) return;
    float* x = c.grads[block.grad] + block.begin;
    for (int64_t k = 0; k < block.size; ++k) x[k] *= scale;
  });
}

}  // namespace

void MOKD_JOIN(clip_, MOKD_LEVEL)(const Clip& c) { clip(c); }

}  // namespace mokd::cpu
