// feature_search and joint_attention on the CPU. Compiled once for every x86-64 level, as distill.cpp.
//
// Forward: rows (the queries, in joint_attention the tokens before them) attend over the N tokens of
// their image, ROWS of them and KEYS tokens at a time, with a running maximum; the scores stay in L1.
// joint_attention then gives each token to each query in one pass: with the query's key at score e,
//   token = o + share * (v_x - o)     share = w / (w + sum)     w = exp((e - max) / sqrt d)
// Nothing [Q, B, N + 1] wide is made but the result. Backward makes the scores again from (max, sum); what
// the shares say to them is one number a row: d(max + log sum) = - sum_q de.
//
// Rows stand in the lanes of a vector (x transposed), so maxima and exponentials need no reduction.
// A piece of work is a tile of rows of a head (forward) or a whole head (backward): the thread count
// changes no bit. Keys and values are read where they lie, or widened a block at a time.
#include "search.h"

#include <algorithm>
#include <cmath>

#include "product.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t ROWS = 64, KEYS = 64;
constexpr double LOG2_E = 1.4426950408889634;

template <typename A>
int64_t padded(int64_t width) {
  return (width + LANES<A> - 1) / LANES<A> * LANES<A>;
}

template <typename A>
struct Matrix {
  const A* at;
  int64_t step;
};

// Where one thread works; from `next` on is what backward needs.
template <typename A>
struct Place {
  A *x, *xt, *o, *keys, *values, *scores, *others, *row;
  A *top, *sum, *decay;
  A* next;
  Place(A* at, int64_t D)
      : x(at), xt(x + ROWS * D), o(xt + ROWS * D), keys(o + ROWS * D), values(keys + KEYS * D),
        scores(values + KEYS * D), others(scores + KEYS * ROWS), row(others + KEYS * ROWS), top(row + D),
        sum(top + ROWS), decay(sum + ROWS), next(decay + ROWS) {}
  static int64_t size(int64_t D) { return 5 * ROWS * D + 2 * KEYS * ROWS + D + 3 * ROWS; }
};

// One head of one image.
template <typename A>
struct Head {
  static constexpr int64_t L = LANES<A>;
  const Search& s;
  int64_t b, h;
  int64_t d = s.width, D = padded<A>(s.width);
  A scale = A(1 / std::sqrt(double(s.width)));
  A rate = A(LOG2_E / std::sqrt(double(s.width)));  // of an exponent to 2
};

template <typename A>
const A* vector_at(const Heads& t, int64_t i, int64_t j, int64_t k, int64_t n, A* buffer) {
  const Rows one = {static_cast<const char*>(t.data) +
                        (i * t.stride[0] + j * t.stride[1] + k * t.stride[2]) * item_size(t.type),
                    t.type, 0, 1};
  return values<A>(one, 0, 0, n, buffer);
}

template <typename A>
void copy_padded(const A* from, int64_t d, int64_t D, A* to) {
  if (from != to) std::memcpy(to, from, d * sizeof(A));
  for (int64_t k = d; k < D; ++k) to[k] = 0;
}

// Keys or values [n0, n0 + n) of a head where they lie, or in `buffer`: of another type, or with a width
// of no whole vectors where these are needed.
template <typename A>
Matrix<A> tokens_at(const Head<A>& g, const Heads& t, int64_t n0, int64_t n, bool whole, A* buffer) {
  const A* first = vector_at<A>(t, g.b, g.h, n0, g.d, buffer);
  if (first != buffer && (!whole || g.d == g.D)) return {first, t.stride[2]};
  for (int64_t i = 0; i < n; ++i)
    copy_padded(vector_at<A>(t, g.b, g.h, n0 + i, g.d, buffer + i * g.D), g.d, g.D, buffer + i * g.D);
  return {buffer, g.D};
}

// The same of queries [j, j + n), always in `to`.
template <typename A>
void queries_at(const Head<A>& g, const Heads& t, int64_t j, int64_t n, A* to) {
  for (int64_t i = 0; i < n; ++i)
    copy_padded(vector_at<A>(t, j + i, g.b, g.h, g.d, to + i * g.D), g.d, g.D, to + i * g.D);
}

// Rows [m, m + n) of x, and zeros up to whole vectors of them.
template <typename A>
void rows_at(const Head<A>& g, int64_t m, int64_t n, A* to) {
  const int64_t own = own_rows(g.s);
  if (m >= own) {
    queries_at(g, g.s.x, m - own, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i)
      copy_padded(vector_at<A>(g.s.q, g.b, g.h, m + i, g.d, to + i * g.D), g.d, g.D, to + i * g.D);
  }
  std::memset(to + n * g.D, 0, (padded<A>(n) - n) * g.D * sizeof(A));
}

// to[k][i] = from[i][k], ROWS apart.
template <typename A>
void transpose(const A* from, int64_t n, int64_t D, A* to) {
  constexpr int L = LANES<A>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t k = 0; k < D; ++k) {
      Vec<A> v;
      for (int u = 0; u < L; ++u) v[u] = from[(i + u) * D + k];
      store(to + k * ROWS + i, v);
    }
}

template <typename A>
A dot(const A* a, const A* b, int64_t D) {
  Vec<A> sum = {};
  for (int64_t k = 0; k < D; k += LANES<A>) sum += load<Vec<A>>(a + k) * load<Vec<A>>(b + k);
  return reduce_add<A>(sum);
}

template <typename A>
void write(Type type, const A* from, int64_t n, A* row, void* base, int64_t at) {
  std::memcpy(row, from, n * sizeof(A));
  narrow(type, n, row);
  std::memcpy(static_cast<char*>(base) + at * item_size(type), row, n * item_size(type));
}

// The share of a key at score e beside those whose largest score and sum of exponentials are given.
template <typename A>
Vec<A> share(Vec<A> e, Vec<A> top, Vec<A> sum, A rate) {
  const Vec<A> t = (e - top) * rate, w = exp2_negative(t <= 0 ? t : -t);
  return t <= 0 ? w / (w + sum) : 1 / (1 + sum * w);
}

// Rows of a head lie far apart, where no hardware fetches ahead: the next block, while this one is worked
// on. Packed queries of 196 tokens take 0.7 of the time (bench/search.py).
template <typename A>
void fetch(const Head<A>& g, const Heads& t, int64_t n0, int64_t n) {
  const int64_t item = item_size(t.type), bytes = g.d * item;
  const char* row = static_cast<const char*>(t.data) +
                    (g.b * t.stride[0] + g.h * t.stride[1] + n0 * t.stride[2]) * item;
  for (int64_t i = 0; i < n; ++i, row += t.stride[2] * item)
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k, 0, 2);
}

// Of so few rows a lane each would be mostly empty: dots of theirs are shorter.
constexpr int64_t FEW = 3;

template <typename A>
void score_few(const Head<A>& g, Matrix<A> keys, int64_t n, int64_t rows, const A* x, A* to) {
  for (int64_t k = 0; k < n; ++k) {
    store(to + k * ROWS, Vec<A>{});
    for (int64_t i = 0; i < rows; ++i) to[k * ROWS + i] = dot(x + i * g.D, keys.at + k * keys.step, g.D);
  }
}

// scores [n][ROWS] of keys and the rows in xt.
template <typename A>
void score(const Head<A>& g, Matrix<A> keys, int64_t n, const A* xt, int64_t lanes, A* to) {
  product<false>(Product<A>{keys.at, keys.step, 1, n, g.d, xt, ROWS, to, ROWS}, lanes / LANES<A>);
}

// Scores of tokens [n0, n0 + count) and the n rows in p.x. Backward must find the very bits of forward: the
// sums that it goes by are of these.
template <typename A>
void score_rows(const Head<A>& g, int64_t n0, int64_t count, int64_t n, Place<A>& p, A* to) {
  const Matrix<A> keys = tokens_at(g, g.s.k, n0, count, n <= FEW, p.keys);
  n <= FEW ? score_few(g, keys, count, n, p.x, to) : score(g, keys, count, p.xt, padded<A>(n), to);
}

// c[rows][D] += sum over n keys of scores times a matrix.
template <typename A>
void add_rows(const Head<A>& g, const A* scores, int64_t rows, int64_t n, Matrix<A> b, A* c) {
  product<true>(Product<A>{scores, 1, ROWS, rows, n, b.at, b.step, c, g.D}, g.D / LANES<A>);
}

// c[n][D] += sum over the rows of scores times a matrix of theirs.
template <typename A>
void add_keys(const Head<A>& g, const A* scores, int64_t n, int64_t rows, const A* b, A* c) {
  product<true>(Product<A>{scores, ROWS, 1, n, rows, b, g.D, c, g.D}, g.D / LANES<A>);
}

// Scores become exponentials; the rows' maximum and sum move on, and `decay` is what that does to before.
template <typename A>
void exponentials(int64_t n, int64_t lanes, A rate, Place<A>& p) {
  for (int64_t i = 0; i < lanes; i += LANES<A>) {
    const Vec<A> before = load<Vec<A>>(p.top + i);
    Vec<A> top = before, sum = {};
    for (int64_t k = 0; k < n; ++k) {
      const Vec<A> v = load<Vec<A>>(p.scores + k * ROWS + i);
      top = v > top ? v : top;
    }
    for (int64_t k = 0; k < n; ++k) {
      const Vec<A> v = exp2_negative((load<Vec<A>>(p.scores + k * ROWS + i) - top) * rate);
      sum += v;
      store(p.scores + k * ROWS + i, v);
    }
    const Vec<A> decay = exp2_negative((before - top) * rate);
    store(p.top + i, top), store(p.decay + i, decay);
    store(p.sum + i, load<Vec<A>>(p.sum + i) * decay + sum);
  }
}

template <typename A>
void multiply_row(A* row, A factor, int64_t D) {
  for (int64_t k = 0; k < D; k += LANES<A>) store(row + k, load<Vec<A>>(row + k) * factor);
}

// to = o + share (v - o)
template <typename A>
void mix(const A* o, const A* v, A share, int64_t D, A* to) {
  for (int64_t k = 0; k < D; k += LANES<A>) {
    const Vec<A> own = load<Vec<A>>(o + k);
    store(to + k, own + share * (load<Vec<A>>(v + k) - own));
  }
}

template <typename A>
void shares(int64_t n, int64_t lanes, A rate, Place<A>& p) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < lanes; i += LANES<A>) {
      A* at = p.scores + j * ROWS + i;
      store(at, share<A>(load<Vec<A>>(at), load<Vec<A>>(p.top + i), load<Vec<A>>(p.sum + i), rate));
    }
}

// Each of these tokens as it is with each query.
template <typename A>
void merge_tokens(const Head<A>& g, const SearchForward& io, int64_t m, int64_t n, Place<A>& p) {
  const Search& s = g.s;
  for (int64_t j0 = 0; j0 < s.queries; j0 += KEYS) {
    const int64_t count = std::min(KEYS, s.queries - j0), lanes = padded<A>(n);
    queries_at(g, s.kx, j0, count, p.keys);
    queries_at(g, s.vx, j0, count, p.values);
    score(g, {p.keys, g.D}, count, p.xt, lanes, p.scores);
    shares(count, lanes, g.rate, p);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; ++i) {
        mix(p.o + i * g.D, p.values + j * g.D, p.scores[j * ROWS + i], g.D, p.x);
        const int64_t at = ((((j0 + j) * s.images + g.b) * s.tokens + m + i) * s.heads + g.h) * g.d;
        write(s.type, p.x, g.d, p.row, io.tokens, at);
      }
  }
}

// The shares of the queries' own keys, for rows [j, j + n) of queries, to the first line of scores.
template <typename A>
void own_shares(const Head<A>& g, int64_t j, int64_t n, Place<A>& p) {
  queries_at(g, g.s.kx, j, n, p.keys);
  queries_at(g, g.s.vx, j, n, p.values);
  for (int64_t i = 0; i < n; ++i) p.scores[i] = dot(p.x + i * g.D, p.keys + i * g.D, g.D);
  for (int64_t i = n; i < padded<A>(n); ++i) p.scores[i] = 0;
  shares(1, padded<A>(n), g.rate, p);
}

template <typename A>
void merge_queries(const Head<A>& g, const SearchForward& io, int64_t j, int64_t n, Place<A>& p) {
  own_shares(g, j, n, p);
  for (int64_t i = 0; i < n; ++i) {
    mix(p.o + i * g.D, p.values + i * g.D, p.scores[i], g.D, p.o + i * g.D);
    const int64_t at = (((j + i) * g.s.images + g.b) * g.s.heads + g.h) * g.d;
    write(g.s.type, p.o + i * g.D, g.d, p.row, io.query, at);
  }
}

// Scores of keys [n0, n0 + n) as they are; `finish_weights` makes them weights.
template <typename A>
A* weights_at(const Head<A>& g, const SearchForward& io, int64_t j) {
  return static_cast<A*>(io.weights) + ((j * g.s.images + g.b) * g.s.heads + g.h) * g.s.tokens;
}

template <typename A>
void finish_weights(const Head<A>& g, A* at, A top, A sum) {
  constexpr int64_t L = LANES<A>;
  for (int64_t k = 0; k < g.s.tokens; k += L) {
    const int64_t rest = std::min(L, g.s.tokens - k);
    const Vec<A> w = exp2_negative((load_tail(at + k, rest, top) - top) * g.rate) / sum;
    std::memcpy(at + k, &w, rest * sizeof(A));
  }
}

// Rows [m, m + n) over all tokens: p.o, p.top and p.sum.
template <typename A>
void attend(const Head<A>& g, const SearchForward& io, int64_t m, int64_t n, Place<A>& p) {
  const int64_t lanes = padded<A>(n);
  rows_at(g, m, n, p.x);
  transpose(p.x, lanes, g.D, p.xt);
  std::memset(p.o, 0, n * g.D * sizeof(A));
  for (int64_t i = 0; i < lanes; ++i) p.top[i] = sizeof(A) == 4 ? A(-FLT_MAX) : A(-1e290), p.sum[i] = 0;
  for (int64_t n0 = 0; n0 < g.s.tokens; n0 += KEYS) {
    const int64_t count = std::min(KEYS, g.s.tokens - n0);
    fetch(g, g.s.v, n0, count);
    score_rows(g, n0, count, n, p, p.scores);
    if (n0 + count < g.s.tokens) fetch(g, g.s.k, n0 + count, std::min(KEYS, g.s.tokens - n0 - count));
    if (io.weights)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < count; ++k) weights_at(g, io, m + i)[n0 + k] = p.scores[k * ROWS + i];
    exponentials(count, lanes, g.rate, p);
    if (n0)
      for (int64_t i = 0; i < n; ++i)
        if (p.decay[i] != 1) multiply_row(p.o + i * g.D, p.decay[i], g.D);
    add_rows(g, p.scores, n, count, tokens_at(g, g.s.v, n0, count, true, p.values), p.o);
  }
}

template <typename A>
void forward_tile(const Head<A>& g, const SearchForward& io, int64_t m, int64_t n, Place<A>& p) {
  attend(g, io, m, n, p);
  for (int64_t i = 0; i < n; ++i) {
    multiply_row(p.o + i * g.D, 1 / p.sum[i], g.D);
    const int64_t at = (g.b * rows(g.s) + m + i) * g.s.heads + g.h;
    std::memcpy(static_cast<A*>(io.rows) + at * g.d, p.o + i * g.D, g.d * sizeof(A));
    A* stats = static_cast<A*>(io.stats) + at * 2;
    stats[0] = p.top[i], stats[1] = p.sum[i];
    if (io.weights) finish_weights(g, weights_at(g, io, m + i), p.top[i], p.sum[i]);
  }
  if (!joint(g.s)) return;
  m < own_rows(g.s) ? merge_tokens(g, io, m, n, p) : merge_queries(g, io, m - own_rows(g.s), n, p);
}

int64_t tiles_of(int64_t count) { return (count + ROWS - 1) / ROWS; }

// A tile of rows; none holds both tokens and queries.
struct Span {
  int64_t first, count;
};

Span span_at(const Search& s, int64_t tile) {
  const int64_t own = own_rows(s), before = tiles_of(own);
  const int64_t first = tile < before ? tile * ROWS : own + (tile - before) * ROWS;
  const int64_t end = tile < before ? own : rows(s);
  return {first, std::min(ROWS, end - first)};
}

int64_t tiles_of(const Search& s) { return tiles_of(own_rows(s)) + tiles_of(s.queries); }

template <typename A, typename Work>
void each(const Search& s, int64_t items, int64_t more, const Work& work) {
  const int64_t D = padded<A>(s.width), size = padded<A>(Place<A>::size(D) + more);
  const Buffer memory(size * sizeof(A) * (s.threads > 1 ? s.threads : 1));
  parallel(s.threads, items, [&](int64_t item, int thread) {
    Place<A> place(reinterpret_cast<A*>(memory.get()) + thread * size, D);
    work(item, place);
  });
}

template <typename A>
void forward(const Search& s, const SearchForward& io) {
  const int64_t tiles = tiles_of(s);
  each<A>(s, s.images * s.heads * tiles, 0, [&](int64_t item, Place<A>& place) {
    const int64_t head = item / tiles;
    const Span at = span_at(s, item % tiles);
    forward_tile(Head<A>{s, head / s.heads, head % s.heads}, io, at.first, at.count, place);
  });
}

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

void run_forward(const Search& s, const SearchForward& io) {
  s.type == F64 ? forward<double>(s, io) : forward<float>(s, io);
}

void run_backward(const Search& s, const SearchBackward& io) {
  s.type == F64 ? backward<double>(s, io) : backward<float>(s, io);
}

}  // namespace

extern const SearchKernels MOKD_JOIN(search_kernels_, MOKD_LEVEL);
const SearchKernels MOKD_JOIN(search_kernels_, MOKD_LEVEL) = {run_forward, run_backward};

}  // namespace mokd::cpu
