// A matrix product whose left side has any strides and whose right side is whole vectors: what the attention
// of search.cpp and attention.cpp and the prototypes of fp32 are made of. Sums stay in registers.
#pragma once
#include "vector.h"

namespace mokd::cpu {
namespace {

// c[i][:] = or += sum_j a(i, j) b[j][:], a(i, j) = a[i * row + j * term]; steps are between rows.
// A term is a number of the type of the sums, or several in one I (pairs.h).
template <typename A, typename I = A>
struct Product {
  const I* a;
  int64_t row, term;
  int64_t rows, terms;
  const I* b;
  int64_t b_step;
  A* c;
  int64_t c_step;
};

template <typename A>
inline void add_term(Vec<A>& sum, A a, Vec<A> b) {
  sum += a * b;
}

constexpr int WIDE = WIDTH == 64 ? 4 : 2;  // vectors of a row at a time; 24 or 12 sums fill the registers

template <int R, int W, bool ADD, typename A, typename I>
inline __attribute__((always_inline)) void product_block(const Product<A, I>& p, int64_t i, int64_t w) {
  constexpr int L = LANES<A>;
  const I *a = p.a + i * p.row, *b = p.b + w * L;
  A* c = p.c + i * p.c_step + w * L;
  Vec<A> sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < W; ++u) sum[r][u] = ADD ? load<Vec<A>>(c + r * p.c_step + u * L) : Vec<A>{};
  for (int64_t j = 0; j < p.terms; ++j, a += p.term, b += p.b_step) {
    Vec<I> right[W];
#pragma GCC unroll 4
    for (int u = 0; u < W; ++u) right[u] = load<Vec<I>>(b + u * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int u = 0; u < W; ++u) add_term(sum[r][u], a[r * p.row], right[u]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < W; ++u) store(c + r * p.c_step + u * L, sum[r][u]);
}

// The rows that are left, fewer than R + 1.
template <int R, int W, bool ADD, typename A, typename I>
void last_rows(const Product<A, I>& p, int64_t i, int64_t w) {
  if (p.rows - i == R) return product_block<R, W, ADD>(p, i, w);
  if constexpr (R > 1) last_rows<R - 1, W, ADD>(p, i, w);
}

template <int W, bool ADD, typename A, typename I>
void product_columns(const Product<A, I>& p, int64_t w) {
  constexpr int R = W == 1 ? 8 : 6;
  int64_t i = 0;
  for (; i + R <= p.rows; i += R) product_block<R, W, ADD>(p, i, w);
  last_rows<R - 1, W, ADD>(p, i, w);
}

// `vectors` of each row.
template <bool ADD, typename A, typename I>
void product(const Product<A, I>& p, int64_t vectors) {
  int64_t w = 0;
  for (; w + WIDE <= vectors; w += WIDE) product_columns<WIDE, ADD>(p, w);
  if constexpr (WIDE == 4) {
    if (vectors - w == 3) return product_columns<3, ADD>(p, w);
    if (vectors - w == 2) return product_columns<2, ADD>(p, w);
  }
  if (vectors - w == 1) product_columns<1, ADD>(p, w);
}

}  // namespace
}  // namespace mokd::cpu
