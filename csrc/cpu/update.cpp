// The end of a step in one pass: each gradient scaled as by the clip, SGD's or AdamW's step with it, and the
// teacher that follows. What takes time is memory, so nothing is read twice and the scaled gradient is
// written nowhere. The arithmetic, with its roundings and its fused a * b + c, is that of PyTorch's fused
// optimizers and of its lerp (aten/src/ATen/native/cpu/Fused{SGD,Adam}Kernel.cpp, LerpKernel.cpp).
#include "update.h"

#include <cmath>
#include <vector>

#include "clip.h"
#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t BLOCK = 1 << 14;  // numbers of a tensor that one thread takes at a time
constexpr int64_t AHEAD = 256;      // numbers: a line of each row is fetched this far before it is needed
constexpr int L = LANES<float>;
using V = Vec<float>;

inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<V>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline V root(V x) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<V>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<V>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int i = 0; i < L; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

enum Kind { NONE, PLAIN, MOMENTUM, ADAMW };

// From a to b by a part of the way. As in PyTorch's lerp, the nearer end is where it starts from.
struct Way {
  V part;
  bool from_b;
  Way() = default;
  explicit Way(double all) : part(V{} + float(all)), from_b(!(std::fabs(float(all)) < 0.5f)) {
    if (from_b) part -= 1.0f;
  }
  V operator()(V a, V b) const { return fma(part, b - a, from_b ? b : a); }
};

// The numbers of a tensor as vectors multiply them.
struct Numbers {
  V scale, keep, rate, decay, momentum, second, rest, size, root, eps;
  bool decays;
  Way first, teacher;
};

V all(double x) { return V{} + float(x); }

Numbers numbers(const Update& u, const Moved& t) {
  Numbers n = {};
  if (t.teacher) n.teacher = Way(1 - *u.momentum);
  if (t.group < 0) return n;
  const Group& g = u.groups[t.group];
  n.scale = all(t.norm ? clip_scale(*t.norm, u.max_norm) : 1);
  n.decays = g.decay != 0, n.decay = all(g.decay), n.rate = all(-g.rate), n.momentum = all(g.first);
  if (!t.step) return n;
  const double step = *t.step + 1;
  n.keep = all(1 - g.rate * g.decay);
  n.first = Way(1 - g.first), n.second = all(g.second), n.rest = all(1 - g.second);
  n.size = all(-(g.rate / (1 - std::pow(g.first, step))));
  n.root = all(std::sqrt(1 - std::pow(g.second, step)));
  n.eps = all(g.eps);
  return n;
}

// One vector of every row. A row that a kind does not have is null and not touched.
template <Kind KIND, bool TEACHER, typename Load, typename Store>
inline void move(const Moved& t, const Numbers& n, int64_t k, const Load& get, const Store& put) {
  V weight = get(t.weight + k);
  if constexpr (KIND == PLAIN || KIND == MOMENTUM) {
    V grad = get(t.grad + k) * n.scale;
    if (n.decays) grad = fma(weight, n.decay, grad);  // an infinite weight has none
    if constexpr (KIND == MOMENTUM) {
      grad = get(t.first + k) * n.momentum + grad;
      put(t.first + k, grad);
    }
    weight = fma(grad, n.rate, weight);
  }
  if constexpr (KIND == ADAMW) {
    const V grad = get(t.grad + k) * n.scale;
    const V first = n.first(get(t.first + k), grad);
    const V second = fma(n.rest * grad, grad, get(t.second + k) * n.second);
    put(t.first + k, first), put(t.second + k, second);
    weight = weight * n.keep + n.size * first / (root(second) / n.root + n.eps);
  }
  if constexpr (KIND != NONE) put(t.weight + k, weight);
  if constexpr (TEACHER) {
    put(t.teacher + k, n.teacher(get(t.teacher + k), weight));
  }
}

template <Kind KIND, bool TEACHER>
void move(const Moved& t, const Numbers& n, int64_t begin, int64_t end) {
  int64_t k = begin;
  for (; k + L <= end; k += L) {
    __builtin_prefetch(t.weight + k + AHEAD, KIND != NONE);
    if (KIND != NONE) __builtin_prefetch(t.grad + k + AHEAD);
    if (KIND == MOMENTUM || KIND == ADAMW) __builtin_prefetch(t.first + k + AHEAD, 1);
    if (KIND == ADAMW) __builtin_prefetch(t.second + k + AHEAD, 1);
    if (TEACHER) __builtin_prefetch(t.teacher + k + AHEAD, 1);
    move<KIND, TEACHER>(
        t, n, k, [](const float* p) { return load<V>(p); }, [](float* p, V v) { store(p, v); });
  }
  if (const int64_t rest = end - k)
    move<KIND, TEACHER>(
        t, n, k, [rest](const float* p) { return load_tail(p, rest, 1.0f); },
        [rest](float* p, V v) { std::memcpy(p, &v, rest * sizeof(float)); });
}

template <Kind KIND>
void move(const Moved& t, const Numbers& n, int64_t begin, int64_t end) {
  t.teacher ? move<KIND, true>(t, n, begin, end) : move<KIND, false>(t, n, begin, end);
}

Kind kind(const Moved& t, bool skip) {
  if (t.group < 0 || skip) return NONE;
  return t.step ? ADAMW : t.first ? MOMENTUM : PLAIN;
}

struct Block {
  int64_t tensor, begin, end;
};

void update(const Update& u) {
  const bool skip = u.skip && *u.skip;
  std::vector<Numbers> of(u.count);
  std::vector<Block> blocks;
  for (int64_t i = 0; i < u.count; ++i) {
    const Moved& t = u.tensors[i];
    of[i] = numbers(u, t);
    if (kind(t, skip) == ADAMW) *t.step += 1;
    if (kind(t, skip) == NONE && !t.teacher) continue;
    for (int64_t k = 0; k < t.size; k += BLOCK)
      blocks.push_back({i, k, k + BLOCK < t.size ? k + BLOCK : t.size});
  }
  parallel(u.threads, int64_t(blocks.size()), [&](int64_t b, int) {
    const auto [i, begin, end] = blocks[b];
    const Moved& t = u.tensors[i];
    switch (kind(t, skip)) {
      case NONE: return move<NONE>(t, of[i], begin, end);
      case PLAIN: return move<PLAIN>(t, of[i], begin, end);
      case MOMENTUM: return move<MOMENTUM>(t, of[i], begin, end);
      case ADAMW: return move<ADAMW>(t, of[i], begin, end);
    }
  });
}

}  // namespace

void MOKD_JOIN(update_, MOKD_LEVEL)(const Update& u) { update(u); }

}  // namespace mokd::cpu
