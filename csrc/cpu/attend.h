// What forward (search.cpp) and backward (search_backward.cpp) of the feature search share: where a thread
// works, how it reads rows, keys and values, their scores and exponentials, and the tiles of rows.
//
// Rows stand in the lanes of a vector (x transposed), so maxima and exponentials need no reduction.
// Keys and values are read where they lie, or widened a block at a time.
#pragma once
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
  A *x, *xt, *o, *keys, *values, *scores, *row;
  A *top, *sum, *decay;
  A* next;
  Place(A* at, int64_t D)
      : x(at), xt(x + ROWS * D), o(xt + ROWS * D), keys(o + ROWS * D), values(keys + KEYS * D),
        scores(values + KEYS * D), row(scores + KEYS * ROWS), top(row + D), sum(top + ROWS),
        decay(sum + ROWS), next(decay + ROWS) {}
  static int64_t size(int64_t D) { return 3 * ROWS * D + 2 * KEYS * D + KEYS * ROWS + D + 3 * ROWS; }
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

// The shares of the queries' own keys, for rows [j, j + n) of queries, to the first line of scores.
template <typename A>
void own_shares(const Head<A>& g, int64_t j, int64_t n, Place<A>& p) {
  queries_at(g, g.s.kx, j, n, p.keys);
  queries_at(g, g.s.vx, j, n, p.values);
  for (int64_t i = 0; i < n; ++i) p.scores[i] = dot(p.x + i * g.D, p.keys + i * g.D, g.D);
  for (int64_t i = n; i < padded<A>(n); ++i) p.scores[i] = 0;
  shares(1, padded<A>(n), g.rate, p);
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

}  // namespace
}  // namespace mokd::cpu
