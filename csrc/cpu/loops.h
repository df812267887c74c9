// The loops of distill_cross_entropy over one block of columns. Letters as in distill.cpp.
#pragma once
#include <type_traits>

#include "vector.h"

namespace mokd::cpu {
namespace {

// Columns worked on at a time: of fewer, what each row costs by itself counts more, more leave the nearest
// caches (bench/distill.py, in bf16 and up to B = 8).
constexpr int64_t BLOCK = 2048;
constexpr int AHEAD = 6;             // rows fetched ahead (bench/distill.py, B = 16 and 32)
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
  Vec<A> a = Vec<A>{} + lowest, b = a;
  int64_t k = 0;
  for (; k + 2 * L <= n; k += 2 * L)
    a = larger(row.template get<0>(k), a), b = larger(row.template get<1>(k), b);
  if constexpr (!Row::paired)
    for (; k < n; k += L) a = larger(row.tail(k, n - k < L ? n - k : L, lowest), a);
  return reduce_max<A>(larger(a, b));
}

// In double: a chain of fp32 additions is off by 8e-6 after a block of 1/1000.
template <typename A>
double sum(const A* x, int64_t n) {
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += x[k];
  return total;
}

// e[k] = 2^((x[k] - max) * scale), zeros up to a whole vector; returns the sum.
template <typename A, typename Row>
A exponentials(Row row, A max, A scale, int64_t n, A* e, Next next) {
  constexpr int L = LANES<A>;
  Vec<A> total = {};
  int64_t k = 0;
  next.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    const Vec<A> v = exp2_negative((row.template get<0>(k) - max) * scale);
    const Vec<A> w = exp2_negative((row.template get<1>(k) - max) * scale);
    total += v;
    total += w;
    store(row.template tile<0>(e, k), v), store(row.template tile<1>(e, k), w);
  }
  if constexpr (!Row::paired) {
    for (; k < n; k += L) {
      const Vec<A> x = row.tail(k, n - k < L ? n - k : L, A(-__builtin_inff()));
      const Vec<A> v = exp2_negative((x - max) * scale);
      total += v;
      store(e + k, v);
    }
  }
  return reduce_add<A>(total);
}

// A teacher row that is the target of one view only: its exponentials are made where that view's loop
// needs them and kept nowhere.
template <typename A, typename Row>
struct Lone {
  static constexpr bool exists = true;
  Row row;
  A max, scale;
  Next next;
  void fetch(int64_t k) const { next.fetch(k); }
  template <int I>
  Vec<A> get(int64_t k) const {
    return exp2_negative((row.template get<I>(k) - max) * scale);
  }
  Vec<A> tail(int64_t k, int64_t count) const {
    return exp2_negative((row.tail(k, count, A(-__builtin_inff())) - max) * scale);
  }
};

struct NoLone {
  static constexpr bool exists = false;
  void fetch(int64_t) const {}
};

// The columns from k on, which fill no pair of vectors, for `student_block`. Apart from it, because what
// has an index that is no constant, as d would, lies in memory.
template <typename A, typename Row, typename Own>
__attribute__((noinline)) A student_tail(Row row, A max, A scale, int64_t k, int64_t n, const A* const* e,
                                         int count, A* dots, Own own, A* mass) {
  A total = 0;
  for (; k < n; k += LANES<A>) {  // what is filled in has exponential 0 and, in the dots, difference 0
    const int64_t rest = n - k < LANES<A> ? n - k : LANES<A>;
    total += reduce_add<A>(exp2_negative((row.tail(k, rest, A(-__builtin_inff())) - max) * scale));
    const Vec<A> z = row.tail(k, rest, max) - max;
    for (int i = 0; i < count; ++i) dots[i] += reduce_add<A>(load_tail(e[i] + k, rest, A(0)) * z);
    if constexpr (Own::exists) {
      const Vec<A> u = own.tail(k, rest);
      *mass += reduce_add<A>(u), dots[count] += reduce_add<A>(u * z);
    }
  }
  return total;
}

// sum 2^((x - max) scale), and dots[i] = sum e_i (x - max) for N teacher rows and, last, for a lone one,
// whose sum goes to `mass`.
template <int N, typename A, typename Row, typename Own>
A student_block(Row row, A max, A scale, int64_t n, const A* const* e, A* dots, Next next, Own own,
                A* mass) {
  constexpr int L = LANES<A>;
  Vec<A> total = {}, mine = {}, d[N + 1] = {};  // of the lone row: its sum, and its dot at the end
  int64_t k = 0;
  next.fetch(n - 1), own.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    own.fetch(k), own.fetch(k + L);
    const Vec<A> z = row.template get<0>(k) - max, y = row.template get<1>(k) - max;
    total += exp2_negative(z * scale);
    total += exp2_negative(y * scale);
    for (int i = 0; i < N; ++i) d[i] += load<Vec<A>>(row.template tile<0>(e[i], k)) * z;
    for (int i = 0; i < N; ++i) d[i] += load<Vec<A>>(row.template tile<1>(e[i], k)) * y;
    if constexpr (Own::exists) {
      const Vec<A> u = own.template get<0>(k), w = own.template get<1>(k);
      mine += u, d[N] += u * z;
      mine += w, d[N] += w * y;
    }
  }
  for (int i = 0; i < N + Own::exists; ++i) dots[i] = reduce_add<A>(d[i]);
  *mass = reduce_add<A>(mine);
  const A most = reduce_add<A>(total);
  if constexpr (!Row::paired)
    if (k < n) return most + student_tail(row, max, scale, k, n, e, N, dots, own, mass);
  return most;
}

// g = factor 2^((x - max) scale) - sum_i c_i e_i for N teacher rows and, last, a lone one, over whole pairs
// of vectors; returns where they end.
template <int N, typename Row, typename A, typename Own>
int64_t gradient_block(Row row, A max, A scale, A factor, int64_t n, const A* const* tiles, const A* c,
                       Next next, Own own) {
  constexpr int L = LANES<A>;
  const A* e[N + 1];
  for (int i = 0; i < N; ++i) e[i] = tiles[i] + row.first;
  int64_t k = 0;
  next.fetch(n - 1), own.fetch(n - 1);
  for (; k + 2 * L <= n; k += 2 * L) {
    next.fetch(k), next.fetch(k + L);
    own.fetch(k), own.fetch(k + L);
    Vec<A> v = exp2_negative((row.template get<0>(k) - max) * scale) * factor;
    Vec<A> w = exp2_negative((row.template get<1>(k) - max) * scale) * factor;
    for (int i = 0; i < N; ++i) v -= load<Vec<A>>(row.template tile<0>(e[i], k)) * c[i];
    for (int i = 0; i < N; ++i) w -= load<Vec<A>>(row.template tile<1>(e[i], k)) * c[i];
    if constexpr (Own::exists) v -= own.template get<0>(k) * c[N], w -= own.template get<1>(k) * c[N];
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
