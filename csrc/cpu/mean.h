// Means of rows of logits: of a call's teacher rows, to which their centre moves, and `column_mean`. Rows are
// added in an order that does not depend on the threads, nor do the bits. Letters as in distill.cpp.
#pragma once
#include "distill.h"
#include "loops.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t CHAIN = 16;  // rows that are added in fp32 before they go on in double

// sum += x_1 + .. + x_N, or sum = that for the first.
template <int N, typename A>
void add_rows(const A* const* x, int64_t n, bool first, A* sum) {
  constexpr int L = LANES<A>;
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    Vec<A> v = load<Vec<A>>(x[0] + k);
    for (int i = 1; i < N; ++i) v += load<Vec<A>>(x[i] + k);
    store(sum + k, first ? v : load<Vec<A>>(sum + k) + v);
  }
  for (; k < n; ++k) {
    A v = x[0][k];
    for (int i = 1; i < N; ++i) v += x[i][k];
    sum[k] = first ? v : sum[k] + v;
  }
}

// Images that are taken together for the mean of the teacher rows.
struct Group {
  int64_t begin, end;
};

// A block of columns of an image's teacher rows, added to the sums [K] of its group. Row t is widened to
// scratch + t step.
template <typename A>
void add_teachers(const Distill& d, Group group, int64_t image, int64_t k0, int64_t n, A* scratch, int64_t step,
                  A* sum) {
  for (int t = 0; t < d.shape.teachers; t += GROUP) {
    const int count = d.shape.teachers - t < GROUP ? d.shape.teachers - t : GROUP;
    const A* x[GROUP];
    for (int i = 0; i < count; ++i)
      x[i] = values<A>(d.teacher[t + i].rows, image, k0, n, scratch + (t + i) * step);
    with_count(count, [&](auto N) {
      if constexpr (N > 0) add_rows<N>(x, n, image == group.begin && t == 0, sum + k0);
    });
  }
}

// A call's teacher rows added up, CHAIN of them in fp32, and the centre that moves with their mean.
template <typename A>
class Mean {
 public:
  explicit Mean(const Distill& d)
      : d(d), most(CHAIN > d.shape.teachers ? CHAIN / d.shape.teachers : 1),
        memory(d.moved ? groups() * d.shape.columns * sizeof(A) : 0) {}

  int64_t groups() const { return (d.shape.images + most - 1) / most; }
  Group group(int64_t i) const {  // of nearly one size, that threads have as much to do
    return {d.shape.images * i / groups(), d.shape.images * (i + 1) / groups()};
  }
  A* sum(int64_t group) const {  // [K]
    return reinterpret_cast<A*>(memory.get()) + group * d.shape.columns;
  }

  // moved = momentum center + (1 - momentum) mean; without a row the centre stays.
  void move() const {
    const int64_t K = d.shape.columns, rows = d.shape.images * d.shape.teachers;
    const A* center = static_cast<const A*>(d.teacher[0].center);
    const A keep = A(d.momentum), take = A(1 - d.momentum);
    A* moved = static_cast<A*>(d.moved);
    parallel(d.threads, (K + BLOCK - 1) / BLOCK, [&](int64_t i, int) {
      const int64_t begin = i * BLOCK, n = begin + BLOCK < K ? BLOCK : K - begin;
      double total[BLOCK] = {};
      for (int64_t g = 0; g < groups(); ++g)
        for (int64_t k = 0; k < n; ++k) total[k] += sum(g)[begin + k];
      for (int64_t k = 0; k < n; ++k) {
        const A before = center ? center[begin + k] : A(0);
        moved[begin + k] = rows ? before * keep + A(total[k] / double(rows)) * take : before;
      }
    });
  }

 private:
  const Distill& d;
  int64_t most;  // images of a group
  Buffer memory;
};

constexpr int64_t SUMS = 1024;  // columns: with what they are widened to they stay in L1

template <typename A>
void column_mean_tile(const ColumnMean& m, int64_t begin, int64_t n) {
  constexpr int L = LANES<A>;
  alignas(WIDTH) A sum[SUMS] = {}, wide[SUMS];
  double total[SUMS] = {};
  for (int64_t row = 0; row < m.count; ++row) {
    const A* x = values<A>(m.rows, row, begin, n, wide);
    const Next next = {address(m.rows, row + AHEAD, begin), item_size(m.rows.type) * (m.rows.column == 1)};
    int64_t k = 0;
    for (; k + L <= n; k += L) {
      next.fetch(k);
      store(sum + k, load<Vec<A>>(sum + k) + load<Vec<A>>(x + k));
    }
    for (; k < n; ++k) sum[k] += x[k];
    if ((row + 1) % CHAIN && row + 1 < m.count) continue;
    for (k = 0; k < n; ++k) total[k] += sum[k], sum[k] = 0;
  }
  A* mean = static_cast<A*>(m.mean) + begin;
  for (int64_t k = 0; k < n; ++k) mean[k] = m.count ? A(total[k] / double(m.count)) : A(0);
}

template <typename A>
void column_mean(const ColumnMean& m) {
  parallel(m.threads, (m.columns + SUMS - 1) / SUMS, [&](int64_t i, int) {
    const int64_t begin = i * SUMS, rest = m.columns - begin;
    column_mean_tile<A>(m, begin, rest < SUMS ? rest : SUMS);
  });
}

}  // namespace
}  // namespace mokd::cpu
