// feature_search and joint_attention on the CPU. Compiled once for every x86-64 level, as distill.cpp.
//
// Rows (the queries, in joint_attention the tokens before them) attend over the N tokens of their image,
// ROWS of them and KEYS tokens at a time, with a running maximum; the scores stay in L1. joint_attention
// then gives each token to each query in one pass: with the query's key at score e,
//   token = o + share * (v_x - o)     share = w / (w + sum)     w = exp((e - max) / sqrt d)
// Nothing [Q, B, N + 1] wide is made but the result. A piece of work is a tile of rows of a head: the
// thread count changes no bit.
#include "attend.h"

namespace mokd::cpu {
namespace {

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

template <typename A>
void merge_queries(const Head<A>& g, const SearchForward& io, int64_t j, int64_t n, Place<A>& p) {
  own_shares(g, j, n, p);
  for (int64_t i = 0; i < n; ++i) {
    mix(p.o + i * g.D, p.values + i * g.D, p.scores[i], g.D, p.o + i * g.D);
    const int64_t at = (((j + i) * g.s.images + g.b) * g.s.heads + g.h) * g.d;
    write(g.s.type, p.o + i * g.D, g.d, p.row, io.query, at);
  }
}

// Of one query; scores until `finish_weights` makes them weights. [N]
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

template <typename A>
void forward(const Search& s, const SearchForward& io) {
  const int64_t tiles = tiles_of(s);
  each<A>(s, s.images * s.heads * tiles, 0, [&](int64_t item, Place<A>& place) {
    const int64_t head = item / tiles;
    const Span at = span_at(s, item % tiles);
    forward_tile(Head<A>{s, head / s.heads, head % s.heads}, io, at.first, at.count, place);
  });
}

void run_forward(const Search& s, const SearchForward& io) {
  s.type == F64 ? forward<double>(s, io) : forward<float>(s, io);
}

}  // namespace

void MOKD_JOIN(search_backward_, MOKD_LEVEL)(const Search&, const SearchBackward&);  // search_backward.cpp
extern const SearchKernels MOKD_JOIN(search_kernels_, MOKD_LEVEL);
const SearchKernels MOKD_JOIN(search_kernels_, MOKD_LEVEL) = {run_forward,
                                                              MOKD_JOIN(search_backward_, MOKD_LEVEL)};

}  // namespace mokd::cpu
