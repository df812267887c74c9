// Means of rows of logits: of a call's teacher rows by the read that the loss makes of them, and `column_mean`.
// Rows are added in an order that does not depend on the threads, nor do the bits. Letters as in distill.cpp.
#pragma once
#include "distill.h"
#include "loops.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t CHAIN = 16;  // rows that are added in fp32 before they go on in double

// sum += x_1 + .. + x_N, or sum = that for the `first`. x(i, k): a vector of row i; of(i, k): one number.
template <int N, typename A, typename Vector, typename Number>
void add_rows(const Vector& x, const Number& of, int64_t n, bool first, A* sum) {
  constexpr int L = LANES<A>;
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    Vec<A> v = x(0, k);
    for (int i = 1; i < N; ++i) v += x(i, k);
    store(sum + k, first ? v : load<Vec<A>>(sum + k) + v);
  }
  for (; k < n; ++k) {
    A v = of(0, k);
    for (int i = 1; i < N; ++i) v += of(i, k);
    sum[k] = first ? v : sum[k] + v;
  }
}

// Columns [k0, k0 + n) of an image's teacher rows, added to sum [n]. Scratch: as many blocks as
// teacher rows, to widen in.
template <typename A>
void add_teachers(const Distill& d, int64_t image, int64_t k0, int64_t n, bool first, A* scratch, A* sum) {
  for (int t = 0; t < d.shape.teachers; t += GROUP, first = false) {
    const int count = d.shape.teachers - t < GROUP ? d.shape.teachers - t : GROUP;
    bool halves = sizeof(A) == 4;
    for (int i = 0; i < count; ++i)
      halves &= d.teacher[t + i].rows.type == BF16 && d.teacher[t + i].rows.column == 1;
    with_count(count, [&](auto N) {
      if constexpr (N > 0 && sizeof(A) == 4)
        if (halves) {  // straight to registers
          const uint16_t* x[N];
          for (int i = 0; i < N; ++i)
            x[i] = reinterpret_cast<const uint16_t*>(address(d.teacher[t + i].rows, image, k0));
          add_rows<N>([&](int i, int64_t k) { return widen_bf16(load<Half>(x[i] + k)); },
                      [&](int i, int64_t k) { return widen(x[i][k], BF16); }, n, first, sum);
          return;
        }
      if constexpr (N > 0) {
        const A* x[N];
        for (int i = 0; i < N; ++i) x[i] = values<A>(d.teacher[t + i].rows, image, k0, n, scratch + i * BLOCK);
        add_rows<N>([&](int i, int64_t k) { return load<Vec<A>>(x[i] + k); },
                    [&](int i, int64_t k) { return x[i][k]; }, n, first, sum);
      }
    });
  }
}

// Images [begin, end).
struct Images {
  int64_t begin, end;
};

// Sums of a call's teacher rows, a row [K] for each group of images: of at most CHAIN rows, or of one image.
template <typename A>
class RowSums {
 public:
  explicit RowSums(const Distill& d)
      : d(d), most(CHAIN > d.shape.teachers ? CHAIN / d.shape.teachers : 1),
        memory(d.mean ? groups() * d.shape.columns * sizeof(A) : 0) {}

  int64_t groups() const { return (d.shape.images + most - 1) / most; }
  Images images(int64_t group) const {  // nearly as many each, so that threads have as much to do
    return {d.shape.images * group / groups(), d.shape.images * (group + 1) / groups()};
  }
  A* of(int64_t group) const {  // [K]
    return reinterpret_cast<A*>(memory.get()) + group * d.shape.columns;
  }

  void write_mean() const {  // 0 without rows, as column_mean
    const int64_t K = d.shape.columns, rows = d.shape.images * d.shape.teachers;
    A* mean = static_cast<A*>(d.mean);
    parallel(d.threads, (K + BLOCK - 1) / BLOCK, [&](int64_t i, int) {
      const int64_t begin = i * BLOCK, n = begin + BLOCK < K ? BLOCK : K - begin;
      double total[BLOCK] = {};
      for (int64_t g = 0; g < groups(); ++g)
        for (int64_t k = 0; k < n; ++k) total[k] += of(g)[begin + k];
      for (int64_t k = 0; k < n; ++k) mean[begin + k] = rows ? A(total[k] / double(rows)) : A(0);
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
