// feature_search and joint_attention on CUDA, the simple way: a warp a row, no shared memory, no tensor
// core. It is what a GPU without Triton falls back to, and a second witness of the formula; formula and
// layouts: csrc/core/search.h.
//
//   attend          a warp has one row, walks over the tokens with a running maximum, then merges: a
//                   token with each query, a query with itself
//   row_gradients   a warp has one row: the gradients of o and of the row
//   key_gradients   a warp has one token and walks over all rows
//   query_gradients a warp has one query and walks over all tokens: its key and value
// Each sum is made by one warp in a fixed order: no atomics, the same bits.
#include "search.h"

#ifdef __CUDACC__
#include "launch.h"
#else
#include "emulator.h"  // tests/ops
#endif
#include "tile.h"

#include <stdexcept>

namespace mokd::cuda {
namespace {

constexpr int WARPS = 4, MOST = 128 / WARP;  // of a block; numbers a lane has of a head

struct Parameters {
  Search s;
  SearchForward forward;
  SearchBackward backward;
  void *out, *delta;
};

template <typename A>
__device__ A number(const void* data, Type type, int64_t i) {
  switch (type) {
    case F32: return A(static_cast<const float*>(data)[i]);
    case F64: return A(static_cast<const double*>(data)[i]);
    case BF16: return A(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
    default: return A(__half2float(static_cast<const __half*>(data)[i]));
  }
}

template <typename A>
__device__ void put(void* data, Type type, int64_t i, A x) {
  switch (type) {
    case F32: static_cast<float*>(data)[i] = float(x); break;
    case F64: static_cast<double*>(data)[i] = double(x); break;
    case BF16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(x)); break;
    default: static_cast<__half*>(data)[i] = __float2half_rn(float(x));
  }
}

// A head's numbers, every 32nd of them in a lane; zeros beyond the width.
template <typename A>
struct Vector {
  A at[MOST] = {};

  __device__ static Vector zero() { return {}; }
  template <typename F>
  __device__ void each(int64_t width, const F& f) {
#pragma unroll
    for (int u = 0; u < MOST; ++u) {
      const int64_t k = threadIdx.x % WARP + u * WARP;
      if (k < width) f(at[u], k);
    }
  }
  __device__ void load(const void* data, Type type, int64_t start, int64_t width) {
    each(width, [&](A& x, int64_t k) { x = number<A>(data, type, start + k); });
  }
  __device__ void store(void* data, Type type, int64_t start, int64_t width) {
    each(width, [&](A& x, int64_t k) { put(data, type, start + k, x); });
  }
  __device__ void add(A factor, const Vector& other) {
#pragma unroll
    for (int u = 0; u < MOST; ++u) at[u] += factor * other.at[u];
  }
  __device__ void scale(A factor) {
#pragma unroll
    for (int u = 0; u < MOST; ++u) at[u] *= factor;
  }
};

template <typename A>
__device__ A dot(const Vector<A>& a, const Vector<A>& b) {
  A sum = 0;
#pragma unroll
  for (int u = 0; u < MOST; ++u) sum += a.at[u] * b.at[u];
  return warp_sum(sum);
}

// One head of one image and a row, token or query of it: what a warp works on.
template <typename A>
struct Item {
  const Search& s;
  int64_t i, h, b;
  int64_t d = s.width;
  A scale = A(1 / sqrt(double(s.width)));

  __device__ Item(const Search& search, int64_t item, int64_t count)
      : s(search), i(item % count), h(item / count % s.heads), b(item / count / s.heads) {}

  __device__ Vector<A> at(const Heads& t, int64_t x, int64_t y, int64_t z) const {
    Vector<A> v;
    v.load(t.data, t.type, x * t.stride[0] + y * t.stride[1] + z * t.stride[2], d);
    return v;
  }
  __device__ Vector<A> token(const Heads& t, int64_t n) const { return at(t, b, h, n); }
  __device__ Vector<A> query(const Heads& t, int64_t j) const { return at(t, j, b, h); }
  __device__ Vector<A> x(int64_t m) const {
    return m < own_rows(s) ? token(s.q, m) : query(s.x, m - own_rows(s));
  }
  __device__ int64_t row(int64_t m) const { return (b * rows(s) + m) * s.heads + h; }
  __device__ int64_t query_at(int64_t j) const { return ((j * s.images + b) * s.heads + h) * d; }
  __device__ int64_t token_at(int64_t n) const { return ((b * s.tokens + n) * s.heads + h) * d; }
};

__device__ int64_t item_of_warp() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; }

template <typename A>
constexpr Type TYPE = sizeof(A) == 8 ? F64 : F32;

// Largest score and sum of a row.
template <typename A>
struct Stats {
  A top, sum;
  __device__ Stats(const void* stats, int64_t row)
      : top(static_cast<const A*>(stats)[row * 2]), sum(static_cast<const A*>(stats)[row * 2 + 1]) {}
  __device__ Stats(A top_, A sum_) : top(top_), sum(sum_) {}
  __device__ A share(A e, A scale) const {  // of a key at score e beside them
    const A t = (e - top) * scale, w = exp(t <= 0 ? t : -t);
    return t <= 0 ? w / (w + sum) : 1 / (1 + sum * w);
  }
  __device__ A weight(A e, A scale) const { return exp((e - top) * scale) / sum; }
};

// o + share (v - o)
template <typename A>
__device__ Vector<A> mix(Vector<A> o, const Vector<A>& v, A share) {
#pragma unroll
  for (int u = 0; u < MOST; ++u) o.at[u] += share * (v.at[u] - o.at[u]);
  return o;
}

template <typename A>
__global__ void __launch_bounds__(WARPS* WARP) attend(const __grid_constant__ Parameters p) {
  const Search& s = p.s;
  const int64_t M = rows(s), own = own_rows(s);
  if (item_of_warp() >= s.images * s.heads * M) return;
  const Item<A> g(s, item_of_warp(), M);
  const Vector<A> x = g.x(g.i);
  A* weights = p.forward.weights ? static_cast<A*>(p.forward.weights) + g.query_at(g.i) / g.d * s.tokens : nullptr;
  A top = sizeof(A) == 4 ? A(-FLT_MAX) : A(-1e290), sum = 0;
  Vector<A> o;
  for (int64_t n = 0; n < s.tokens; ++n) {
    const A e = dot(x, g.token(s.k, n)), high = e > top ? e : top;
    const A decay = exp((top - high) * g.scale), w = exp((e - high) * g.scale);
    if (weights && threadIdx.x % WARP == n % WARP) weights[n] = e;
    o.scale(decay);
    o.add(w, g.token(s.v, n));
    sum = sum * decay + w, top = high;
  }
  o.scale(1 / sum);
  const Stats<A> stats(top, sum);
  o.store(p.forward.rows, TYPE<A>, g.row(g.i) * g.d, g.d);
  if (threadIdx.x % WARP == 0) {
    A* at = static_cast<A*>(p.forward.stats) + g.row(g.i) * 2;
    at[0] = top, at[1] = sum;
  }
  for (int64_t n = threadIdx.x % WARP; weights && n < s.tokens; n += WARP)
    weights[n] = stats.weight(weights[n], g.scale);
  if (!joint(s)) return;
  const bool query = g.i >= own;
  for (int64_t j = query ? g.i - own : 0; j < (query ? g.i - own + 1 : s.queries); ++j) {
    const A share = stats.share(dot(x, g.query(s.kx, j)), g.scale);
    Vector<A> found = mix(o, g.query(s.vx, j), share);
    if (query) {
      found.store(p.forward.query, s.type, g.query_at(j), g.d);
    } else {
      const int64_t token = ((j * s.images + g.b) * s.tokens + g.i) * s.heads + g.h;
      found.store(p.forward.tokens, s.type, token * g.d, g.d);
    }
  }
}

// The gradient of row m with query j, a token's or the query's own.
template <typename A>
__device__ Vector<A> gradient(const Item<A>& g, const SearchBackward& io, int64_t m, int64_t j) {
  if (m >= own_rows(g.s)) return g.query(io.grad, j);
  Heads t = io.grad_tokens;
  Vector<A> v;
  v.load(t.data, t.type, j * t.stride[0] + g.b * t.stride[1] + m * t.stride[2] + g.h * g.d, g.d);
  return v;
}

// What row m with query j says to e; the share goes along.
template <typename A>
__device__ A unmix(const Item<A>& g, const Vector<A>& grad, const Vector<A>& o, int64_t j, A share) {
  Vector<A> apart = g.query(g.s.vx, j);
  apart.add(A(-1), o);
  return dot(grad, apart) * share * (1 - share);
}

template <typename A>
__device__ Vector<A> kept(const Item<A>& g, const void* data, int64_t m) {
  Vector<A> v;
  v.load(data, TYPE<A>, g.row(m) * g.d, g.d);
  return v;
}

template <typename A>
__global__ void __launch_bounds__(WARPS* WARP) row_gradients(const __grid_constant__ Parameters p) {
  const Search& s = p.s;
  const SearchBackward& io = p.backward;
  const int64_t M = rows(s), own = own_rows(s);
  if (item_of_warp() >= s.images * s.heads * M) return;
  const Item<A> g(s, item_of_warp(), M);
  const Vector<A> x = g.x(g.i);
  const Stats<A> stats(io.stats, g.row(g.i));
  Vector<A> out, dx;
  A mean = 0;
  if (joint(s)) {
    const Vector<A> o = kept(g, io.rows, g.i);
    const bool query = g.i >= own;
    for (int64_t j = query ? g.i - own : 0; j < (query ? g.i - own + 1 : s.queries); ++j) {
      const Vector<A> key = g.query(s.kx, j), grad = gradient(g, io, g.i, j);
      const A share = stats.share(dot(x, key), g.scale), de = unmix(g, grad, o, j, share);
      out.add(1 - share, grad);
      dx.add(de * g.scale, key);
      mean += de;
    }
  } else {
    out = g.query(io.grad, g.i);
  }
  for (int64_t n = 0; n < s.tokens; ++n)
    mean += stats.weight(dot(x, g.token(s.k, n)), g.scale) * dot(out, g.token(s.v, n));
  for (int64_t n = 0; n < s.tokens; ++n) {
    const Vector<A> key = g.token(s.k, n);
    const A w = stats.weight(dot(x, key), g.scale);
    dx.add(w * (dot(out, g.token(s.v, n)) - mean) * g.scale, key);
  }
  out.store(p.out, TYPE<A>, g.row(g.i) * g.d, g.d);
  if (threadIdx.x % WARP == 0) static_cast<A*>(p.delta)[g.row(g.i)] = mean;
  if (g.i < own) dx.store(io.q, s.type, g.token_at(g.i), g.d);
  else dx.store(io.x, s.type, g.query_at(g.i - own), g.d);
}

template <typename A>
__global__ void __launch_bounds__(WARPS* WARP) key_gradients(const __grid_constant__ Parameters p) {
  const Search& s = p.s;
  if (item_of_warp() >= s.images * s.heads * s.tokens) return;
  const Item<A> g(s, item_of_warp(), s.tokens);
  const Vector<A> key = g.token(s.k, g.i), value = g.token(s.v, g.i);
  Vector<A> dk, dv;
  for (int64_t m = 0; m < rows(s); ++m) {
    const Vector<A> x = g.x(m), out = kept(g, p.out, m);
    const A w = Stats<A>(p.backward.stats, g.row(m)).weight(dot(x, key), g.scale);
    dv.add(w, out);
    dk.add(w * (dot(out, value) - static_cast<const A*>(p.delta)[g.row(m)]) * g.scale, x);
  }
  dk.store(p.backward.k, s.type, g.token_at(g.i), g.d);
  dv.store(p.backward.v, s.type, g.token_at(g.i), g.d);
}

template <typename A>
__global__ void __launch_bounds__(WARPS* WARP) query_gradients(const __grid_constant__ Parameters p) {
  const Search& s = p.s;
  if (item_of_warp() >= s.images * s.heads * s.queries) return;
  const Item<A> g(s, item_of_warp(), s.queries);
  const Vector<A> key = g.query(s.kx, g.i);
  Vector<A> dk, dv;
  for (int64_t m = 0; m <= s.tokens; ++m) {  // the last row is the query's own
    const int64_t row = m < s.tokens ? m : s.tokens + g.i;
    const Vector<A> x = g.x(row), grad = gradient(g, p.backward, row, g.i);
    const A share = Stats<A>(p.backward.stats, g.row(row)).share(dot(x, key), g.scale);
    dv.add(share, grad);
    dk.add(unmix(g, grad, kept(g, p.backward.rows, row), g.i, share) * g.scale, x);
  }
  dk.store(p.backward.kx, s.type, g.query_at(g.i), g.d);
  dv.store(p.backward.vx, s.type, g.query_at(g.i), g.d);
}

void launch_warps(void (*f32)(Parameters), void (*f64)(Parameters), int64_t of_a_head, const Parameters& p,
                  void* stream) {
  const int64_t items = p.s.images * p.s.heads * of_a_head;
  if (items) launch(p.s.type == F64 ? f64 : f32, (items + WARPS - 1) / WARPS, WARPS * WARP, 0, stream, p);
}

}  // namespace

void forward(const Search& search, const SearchForward& io, Place place) {
  OnDevice device(place.device);
  launch_warps(attend<float>, attend<double>, rows(search), {search, io, {}, nullptr, nullptr}, place.stream);
}

void backward(const Search& search, const SearchBackward& io, void* out, void* delta, Place place) {
  OnDevice device(place.device);
  const Parameters p = {search, {}, io, out, delta};
  launch_warps(row_gradients<float>, row_gradients<double>, rows(search), p, place.stream);
  launch_warps(key_gradients<float>, key_gradients<double>, search.tokens, p, place.stream);
  if (joint(search)) launch_warps(query_gradients<float>, query_gradients<double>, search.queries, p, place.stream);
}

}  // namespace mokd::cuda
