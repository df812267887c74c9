// The gradients of feature_search and joint_attention on the CPU. Compiled once for every x86-64 level.
//
// The scores are made again from (max, sum); what the shares of joint_attention say to them is one number a
// row: d(max + log sum) = - sum_q de. A piece of work is a whole head, so that every sum has one order: the
// thread count changes no bit.
#include "attend.h"

namespace mokd::cpu {
namespace {

// The gradients of a head, added up over its tiles: [N][D] and [Q][D].
template <typename A>
struct Sums {
  A *k, *v, *kx, *vx;
  Sums(A* at, const Search& s, int64_t D)
      : k(at), v(k + s.tokens * D), kx(v + s.tokens * D), vx(kx + s.queries * D) {
    std::memset(at, 0, 2 * (s.tokens + s.queries) * D * sizeof(A));
  }
};

// What a gradient of o + share (v_x - o) says to o, v_x and, returned, to e.
template <typename A>
A unmix(const A* grad, const A* o, const A* v, A share, int64_t D, A* to_o, A* to_v) {
  Vec<A> sum = {};
  for (int64_t k = 0; k < D; k += LANES<A>) {
    const Vec<A> g = load<Vec<A>>(grad + k);
    sum += g * (load<Vec<A>>(v + k) - load<Vec<A>>(o + k));
    store(to_o + k, load<Vec<A>>(to_o + k) + (1 - share) * g);
    store(to_v + k, load<Vec<A>>(to_v + k) + share * g);
  }
  return reduce_add<A>(sum) * share * (1 - share);
}

// For a tile of rows: p.x, p.xt and p.o are theirs; `out` takes the gradient of o, `delta` the sum of de,
// `dx` the gradient of x, as far as the queries' keys and values say.
template <typename A>
void unmerge(const Head<A>& g, const SearchBackward& io, Span at, Place<A>& p, A* out, A* delta, A* dx,
             Sums<A>& sums) {
  const Search& s = g.s;
  const int64_t own = own_rows(s), lanes = padded<A>(at.count);
  if (at.first >= own) {
    const int64_t j0 = at.first - own;
    own_shares(g, j0, at.count, p);
    for (int64_t i = 0; i < at.count; ++i) {
      const int64_t j = j0 + i;
      copy_padded(vector_at<A>(io.grad, j, g.b, g.h, g.d, p.row), g.d, g.D, p.row);
      const A de = unmix(p.row, p.o + i * g.D, p.values + i * g.D, p.scores[i], g.D, out + i * g.D,
                         sums.vx + j * g.D);
      delta[i] += de;
      for (int64_t k = 0; k < g.D; ++k) {
        dx[i * g.D + k] += de * g.scale * p.keys[i * g.D + k];
        sums.kx[j * g.D + k] += de * g.scale * p.x[i * g.D + k];
      }
    }
    return;
  }
  Heads grads = io.grad_tokens;
  grads.data = static_cast<const char*>(grads.data) + g.h * g.d * item_size(grads.type);
  for (int64_t j0 = 0; j0 < s.queries; j0 += KEYS) {
    const int64_t count = std::min(KEYS, s.queries - j0);
    queries_at(g, s.kx, j0, count, p.keys);
    queries_at(g, s.vx, j0, count, p.values);
    score(g, {p.keys, g.D}, count, p.xt, lanes, p.scores);
    shares(count, lanes, g.rate, p);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < at.count; ++i) {
        copy_padded(vector_at<A>(grads, j0 + j, g.b, at.first + i, g.d, p.row), g.d, g.D, p.row);
        A* e = p.scores + j * ROWS + i;
        *e = unmix(p.row, p.o + i * g.D, p.values + j * g.D, *e, g.D, out + i * g.D,
                   sums.vx + (j0 + j) * g.D);
        delta[i] += *e;
        *e *= g.scale;
      }
    add_rows(g, p.scores, at.count, count, Matrix<A>{p.keys, g.D}, dx);
    add_keys(g, p.scores, count, at.count, p.x, sums.kx + j0 * g.D);
  }
}

// The rows of a tile with their own gradients, and all keys and values.
template <typename A>
void backward_tile(const Head<A>& g, const SearchBackward& io, Span at, Place<A>& p, Sums<A>& sums) {
  const Search& s = g.s;
  const int64_t n = at.count, lanes = padded<A>(n), own = own_rows(s);
  A *out = p.next, *dx = out + ROWS * g.D, *outt = dx + ROWS * g.D, *delta = outt + ROWS * g.D;
  A *weights = delta + ROWS, *dps = weights + s.tokens * ROWS;
  std::memset(p.next, 0, (3 * ROWS * g.D + ROWS) * sizeof(A));
  rows_at(g, at.first, n, p.x);
  transpose(p.x, lanes, g.D, p.xt);
  for (int64_t i = 0; i < lanes; ++i) p.top[i] = 0, p.sum[i] = 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = (g.b * rows(s) + at.first + i) * s.heads + g.h;
    if (joint(s)) copy_padded(static_cast<const A*>(io.rows) + row * g.d, g.d, g.D, p.o + i * g.D);
    p.top[i] = static_cast<const A*>(io.stats)[row * 2];
    p.sum[i] = static_cast<const A*>(io.stats)[row * 2 + 1];
  }
  if (joint(s))
    unmerge(g, io, at, p, out, delta, dx, sums);
  else
    queries_at(g, io.grad, at.first, n, out);
  transpose(out, lanes, g.D, outt);
  // The mean of dp = out v over the tokens takes the very numbers that it is subtracted from: where one
  // token has all the weight the difference must be 0, and out o would leave a rounding of it.
  for (int64_t n0 = 0; n0 < s.tokens; n0 += KEYS) {
    const int64_t count = std::min(KEYS, s.tokens - n0);
    A *w = weights + n0 * ROWS, *dp = dps + n0 * ROWS;
    score_rows(g, n0, count, n, p, w);
    score(g, tokens_at(g, s.v, n0, count, false, p.values), count, outt, lanes, dp);
    for (int64_t i = 0; i < lanes; i += Head<A>::L) {
      const Vec<A> top = load<Vec<A>>(p.top + i), inverse = 1 / load<Vec<A>>(p.sum + i);
      Vec<A> mean = load<Vec<A>>(delta + i);
      for (int64_t k = i; k < count * ROWS; k += ROWS) {
        store(w + k, exp2_negative((load<Vec<A>>(w + k) - top) * g.rate) * inverse);
        mean += load<Vec<A>>(w + k) * load<Vec<A>>(dp + k);
      }
      store(delta + i, mean);
    }
  }
  for (int64_t n0 = 0; n0 < s.tokens; n0 += KEYS) {
    const int64_t count = std::min(KEYS, s.tokens - n0);
    A *w = weights + n0 * ROWS, *ds = dps + n0 * ROWS;
    for (int64_t i = 0; i < lanes; i += Head<A>::L)
      for (int64_t k = i; k < count * ROWS; k += ROWS)
        store(ds + k, load<Vec<A>>(w + k) * (load<Vec<A>>(ds + k) - load<Vec<A>>(delta + i)) * g.scale);
    add_keys(g, w, count, n, out, sums.v + n0 * g.D);
    add_keys(g, ds, count, n, p.x, sums.k + n0 * g.D);
    add_rows(g, ds, n, count, tokens_at(g, s.k, n0, count, true, p.keys), dx);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t m = at.first + i;
    const bool token = m < own;
    const int64_t row = token ? g.b * s.tokens + m : (m - own) * s.images + g.b;
    write(s.type, dx + i * g.D, g.d, p.row, token ? io.q : io.x, (row * s.heads + g.h) * g.d);
  }
}

template <typename A>
void backward(const Search& s, const SearchBackward& io) {
  const int64_t D = padded<A>(s.width), tile = 3 * ROWS * D + ROWS + 2 * s.tokens * ROWS;
  each<A>(s, s.images * s.heads, tile + 2 * (s.tokens + s.queries) * D, [&](int64_t item, Place<A>& p) {
    const Head<A> g = {s, item / s.heads, item % s.heads};
    Sums<A> sums(p.next + tile, s, D);
    for (int64_t i = 0; i < tiles_of(s); ++i) backward_tile(g, io, span_at(s, i), p, sums);
    for (int64_t i = 0; i < s.tokens; ++i) {
      const int64_t at = ((g.b * s.tokens + i) * s.heads + g.h) * g.d;
      write(s.type, sums.k + i * D, g.d, p.row, io.k, at);
      write(s.type, sums.v + i * D, g.d, p.row, io.v, at);
    }
    for (int64_t j = 0; joint(s) && j < s.queries; ++j) {
      const int64_t at = ((j * s.images + g.b) * s.heads + g.h) * g.d;
      write(s.type, sums.kx + j * D, g.d, p.row, io.kx, at);
      write(s.type, sums.vx + j * D, g.d, p.row, io.vx, at);
    }
  });
}

}  // namespace

void MOKD_JOIN(search_backward_, MOKD_LEVEL)(const Search&, const SearchBackward&);
void MOKD_JOIN(search_backward_, MOKD_LEVEL)(const Search& s, const SearchBackward& io) {
  s.type == F64 ? backward<double>(s, io) : backward<float>(s, io);
}

}  // namespace mokd::cpu
