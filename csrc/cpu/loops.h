// The loops of distill_cross_entropy over one block of columns. Letters as in distill.cpp.
#pragma once
#include <type_traits>

#include "vector.h"

namespace mokd::cpu {
namespace {

constexpr int64_t BLOCK = 1024;      // columns worked on at a time: rows of a block stay in L1
constexpr int GROUP = 4;             // teacher rows that ride along with a student's exponential
constexpr double LOG2_E = 1.4426950408889634;

// The row that will be worked on some rows later: a vector of it is fetched with each one of this row,
// and first of all its end: a row that starts within a cache line ends one line later.
struct Next {
  const char* row;
  int64_t item;  // bytes
  void fetch(int64_t k) const { __builtin_prefetch(row + k * item, 0, 2); }  // into L2
};

template <typename A, typename Row>
A maximum(Row row, int64_t n) {
  constexpr int L = LANES<A>;
  const A lowest = sizeof(A) == 4 ? A(-FLT_MAX) : A(-1e290);  // a row of -inf keeps a finite maximum
  Vec<A> a = Vec<A>{} + lowest, b = a, v;
  int64_t k = 0;
  for (; k + 2 * L <= n; k += 2 * L) {
    v = row.template get<0>(k), a = v > a ? v : a;
    v = row.template get<1>(k), b = v > b ? v : b;
  }
  if constexpr (!Row::paired) {
    for (; k < n; k += L) {
      v = row.tail(k, n - k < L ? n - k : L, lowest);
      a = v > a ? v : a;
    }
  }
  return reduce_max<A>(a > b ? a : b);
}

// In double: a chain of fp32 additions is off by 8e-6 after a block of 1/1000.
template <typename A>
double sum(const A* x, int64_t n) {
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += x[k];
  return total;
}

// e[k] = factor * 2^((x[k] - max) * scale), zeros up to a whole vector; returns the sum.
template <typename A, typename Row>
A exponentials(Row row, A max, A scale, A factor, int64_t n, A* e, Next next) {
  constexpr int L = LANES<A>;
  Vec<A> total = {};
  int64_t k = 0;
  next.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    const Vec<A> v = exp2_negative((row.template get<0>(k) - max) * scale) * factor;
    const Vec<A> w = exp2_negative((row.template get<1>(k) - max) * scale) * factor;
    total += v;
    total += w;
    store(row.template tile<0>(e, k), v), store(row.template tile<1>(e, k), w);
  }
  if constexpr (!Row::paired) {
    for (; k < n; k += L) {
      const Vec<A> x = row.tail(k, n - k < L ? n - k : L, A(-__builtin_inff()));
      const Vec<A> v = exp2_negative((x - max) * scale) * factor;
      total += v;
      store(e + k, v);
    }
  }
  return reduce_add<A>(total);
}

// sum 2^((x - max) scale), and dots[i] = sum e_i (x - max) for N teacher rows.
template <int N, typename A, typename Row>
A student_block(Row row, A max, A scale, int64_t n, const A* const* e, A* dots, Next next) {
  constexpr int L = LANES<A>;
  Vec<A> total = {}, d[GROUP] = {};
  int64_t k = 0;
  next.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    const Vec<A> z = row.template get<0>(k) - max, y = row.template get<1>(k) - max;
    total += exp2_negative(z * scale);
    total += exp2_negative(y * scale);
    for (int i = 0; i < N; ++i) d[i] += load<Vec<A>>(row.template tile<0>(e[i], k)) * z;
    for (int i = 0; i < N; ++i) d[i] += load<Vec<A>>(row.template tile<1>(e[i], k)) * y;
  }
  if constexpr (!Row::paired) {
    for (; k < n; k += L) {  // what is filled in has exponential 0 and, in the dots, difference 0
      const int64_t rest = n - k < L ? n - k : L;
      total += exp2_negative((row.tail(k, rest, A(-__builtin_inff())) - max) * scale);
      const Vec<A> z = row.tail(k, rest, max) - max;
      for (int i = 0; i < N; ++i) d[i] += load_tail(e[i] + k, rest, A(0)) * z;
    }
  }
  for (int i = 0; i < N; ++i) dots[i] = reduce_add<A>(d[i]);
  return reduce_add<A>(total);
}

// g = factor 2^((x - max) scale) - sum_i c_i q_i for N teacher rows, over whole pairs of vectors;
// returns where they end.
template <int N, typename Row, typename A>
int64_t gradient_block(Row row, A max, A scale, A factor, int64_t n, const A* const* q, const A* c,
                       Next next) {
  constexpr int L = LANES<A>;
  int64_t k = 0;
  next.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    Vec<A> v = exp2_negative((row.template get<0>(k) - max) * scale) * factor;
    Vec<A> w = exp2_negative((row.template get<1>(k) - max) * scale) * factor;
    for (int i = 0; i < N; ++i) v -= load<Vec<A>>(row.template tile<0>(q[i], k)) * c[i];
    for (int i = 0; i < N; ++i) w -= load<Vec<A>>(row.template tile<1>(q[i], k)) * c[i];
    row.put(k, v, w);
  }
  return k;
}

// Calls f with the group's size as a constant.
template <typename F>
auto with_count(int count, const F& f) {
  switch (count) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, GROUP>());
  }
}

}  // namespace
}  // namespace mokd::cpu
