// distill_cross_entropy on the CPU. Compiled once for every x86-64 level (MOKD_LEVEL), so everything
// has internal linkage: of inline functions the linker would keep one copy for all levels.
//
// Forward reads every student and teacher row once (4 (V + T) B K bytes in fp32) and keeps
// 2 (V + T) B numbers; backward reads them once more and writes the gradient once. Work is cut into
// (image, tile of columns); tiles are merged in index order, so the thread count changes no bit.
// Within a tile, blocks of columns stay in L1, and while one row is worked on the next is fetched.
// The maximum is subtracted before the temperature divides: a large common offset costs no digit.
#include "distill.h"

#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "loops.h"

#define MOKD_JOIN_(a, b) a##b
#define MOKD_JOIN(a, b) MOKD_JOIN_(a, b)
#define MOKD_STRING_(a) #a
#define MOKD_STRING(a) MOKD_STRING_(a)

namespace mokd::cpu {
namespace {

constexpr int64_t TILE = 8 * BLOCK;  // columns of one piece of work
constexpr int AHEAD = 6;             // rows fetched ahead (bench/distill.py, B = 16 and 32)

// a takes in b, its right neighbour. Maxima seldom move (running_maximum): `decay` is then mostly 1.
void merge(State a, State b, int T, int V) {
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      a.dot[t * V + v] = merge_dots(a.dot[t * V + v], a.teacher[t], a.student[v],
                                    b.dot[t * V + v], b.teacher[t], b.student[v]);
  for (int t = 0; t < T; ++t) a.teacher[t] = merge(a.teacher[t], b.teacher[t]);
  for (int v = 0; v < V; ++v) a.student[v] = merge(a.student[v], b.student[v]);
}

template <typename A>
double rate_of(const Distill& d, int t) {  // 1 / tau in double: a maximum comes back exactly
  return 1 / double(temperature<A>(d, t));
}

// Up to GROUP teacher rows from t on that are paired with view v; t moves behind the last one.
int next_group(const Distill& d, int v, int* t, int* found) {
  int count = 0;
  for (; *t < d.shape.teachers && count < GROUP; ++*t)
    if (d.pairs[*t * d.shape.views + v] != 0) found[count++] = *t;
  return count;
}

// A block of columns of one image, and the order its rows are visited in: teachers, then students.
struct Block {
  int64_t image, k0, n;
};

Next next_row(const Distill& d, Block at, int row) {
  const int T = d.shape.teachers, all = T + d.shape.views;
  const int64_t k = at.k0 + row / all * BLOCK;  // beyond the last row: of the blocks that follow
  row %= all;
  const Rows& rows = row < T ? d.teacher[row].rows : d.student[row - T];
  return {address(rows, at.image, k), item_size(rows.type) * (rows.column == 1)};
}

// Calls f with a teacher row less its centre.
template <typename A, typename F>
auto with_centre(const Teacher& teacher, Block at, const A* x, const F& f) {
  if (!teacher.center) return f(Scratch<A>{x, nullptr});
  return f(Centred<A>{x, static_cast<const A*>(teacher.center) + at.k0});
}

// Whether a student's block is read as `PairedBf16`; its teachers' exponentials are paired up then.
template <typename A>
bool paired(const Distill& d, Block at) {
  const Rows& student = d.student[0];
  return sizeof(A) == 4 && student.type == BF16 && student.column == 1 && at.n % (2 * LANES<A>) == 0;
}

template <typename A>
const A* in_order(bool pairs, const A* row, int64_t n, A* own) {
  if constexpr (sizeof(A) == 4)
    if (pairs) return pair_up(row, n, own);
  return row;
}

// Maxima never fall from block to block, so that a merge rarely needs an exponential.
template <typename A, typename Row>
A running_maximum(Row row, int64_t n, const Partial* before, double rate) {
  const A top = maximum<A>(row, n);
  if (!before) return top;
  const A last = A(before->max / rate);
  return last > top ? last : top;
}

template <typename A>
Partial forward_teacher(const Distill& d, Block at, int t, A* own, const A** e, const Partial* before) {
  const Teacher& teacher = d.teacher[t];
  const A* x = values<A>(teacher.rows, at.image, at.k0, at.n, own);
  if (teacher.probabilities) {
    const double mass = sum(x, at.n);
    *e = in_order(paired<A>(d, at), x, at.n, own);
    return {0, mass};
  }
  const double rate = rate_of<A>(d, t);
  const Next next = next_row(d, at, t + AHEAD);
  const Partial sum = with_centre<A>(teacher, at, x, [&](auto row) {
    const A max = running_maximum<A>(row, at.n, before, rate);
    const A total = exponentials(row, max, A(rate * LOG2_E), A(1), at.n, own, next);
    return Partial{max * rate, total};
  });
  *e = in_order<A>(paired<A>(d, at), own, at.n, own);
  return sum;
}

template <typename A, typename Row>
void forward_student(const Distill& d, Block at, int v, Row row, const A* const* e, State out,
                     const Partial* before) {
  const int V = d.shape.views, T = d.shape.teachers;
  const double rate = rate_of<A>(d, -1);
  const A max = running_maximum<A>(row, at.n, before, rate), scale = A(rate * LOG2_E);
  const Next next = next_row(d, at, T + v + AHEAD);
  for (int t = 0; t < T; ++t) out.dot[t * V + v] = 0;
  int t = 0, rows[GROUP];
  do {
    const int count = next_group(d, v, &t, rows);
    const A* near[GROUP];
    A dots[GROUP];
    for (int i = 0; i < count; ++i) near[i] = e[rows[i]];
    const A total = with_count(count, [&](auto N) {
      return student_block<N>(row, max, scale, at.n, near, dots, next);
    });
    for (int i = 0; i < count; ++i) out.dot[rows[i] * V + v] = dots[i] * rate;
    out.student[v] = {max * rate, total};
  } while (t < T);
}

// Memory of one call, aligned to cache lines; std::bad_alloc, which reaches Python as MemoryError.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : at(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    if (!at) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
  char* get() const { return static_cast<char*>(at); }

 private:
  void* at;
};

// Where one thread works: blocks of numbers for the scratch, a State and pointers to teacher rows.
template <typename A>
struct Workplace {
  A* scratch;
  double* state;
  const A** rows;
  Workplace(char* at, const Shape& shape)
      : scratch(reinterpret_cast<A*>(at)),
        state(reinterpret_cast<double*>(scratch + (shape.teachers + 2) * BLOCK)),
        rows(reinterpret_cast<const A**>(state + state_size(shape))) {}
  static int64_t bytes(const Shape& shape) {
    const int64_t size = (shape.teachers + 2) * BLOCK * sizeof(A) + state_size(shape) * sizeof(double) +
                         shape.teachers * sizeof(A*);
    return (size / 64 + 1) * 64;
  }
};

// Scratch: a block for every teacher row, then one to widen a row in.
template <typename A>
void forward_item(const Distill& d, Tile at, Workplace<A>& work, State state) {
  const int T = d.shape.teachers, V = d.shape.views;
  A* wide = work.scratch + T * BLOCK;
  for (int64_t k = at.begin; k < at.end; k += BLOCK) {
    const Block block = {at.image, k, k + BLOCK < at.end ? BLOCK : at.end - k};
    const bool first = k == at.begin;
    State out = first ? state : state_at(work.state, d.shape);
    for (int t = 0; t < T; ++t)
      out.teacher[t] = forward_teacher(d, block, t, work.scratch + t * BLOCK, &work.rows[t],
                                       first ? nullptr : &state.teacher[t]);
    for (int v = 0; v < V; ++v) {
      const Partial* before = first ? nullptr : &state.student[v];
      if constexpr (sizeof(A) == 4) {
        if (paired<A>(d, block)) {
          const char* x = address(d.student[v], at.image, k);
          const PairedBf16 row = {reinterpret_cast<const uint16_t*>(x), nullptr};
          forward_student<A>(d, block, v, row, work.rows, out, before);
          continue;
        }
      }
      const A* x = values<A>(d.student[v], at.image, k, block.n, wide);
      forward_student<A>(d, block, v, Scratch<A>{x, nullptr}, work.rows, out, before);
    }
    if (!first) merge(state, out, T, V);
  }
}

// Calls work(item, number of the thread) for every item, neighbours by one thread: it fetches across
// their border. No parallel region for one thread: a forked child would hang in one.
template <typename Work>
void parallel(int threads, int64_t items, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < items; ++i) work(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) work(i, 0);
}

// The same with a workplace for each thread.
template <typename A, typename Work>
void each_item(const Distill& d, int64_t items, const Work& work) {
  const int64_t bytes = Workplace<A>::bytes(d.shape);
  const Buffer memory(bytes * (d.threads > 1 ? d.threads : 1));
  parallel(d.threads, items, [&](int64_t item, int thread) {
    Workplace<A> place(memory.get() + thread * bytes, d.shape);
    work(item, place);
  });
}

template <typename A>
void forward(const Distill& d, const Forward& out) {
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images, cut = tiles(d.shape, TILE), size = state_size(d.shape);
  const Buffer memory((B * cut * size + d.targets) * sizeof(double));
  double *states = reinterpret_cast<double*>(memory.get()), *sums = states + B * cut * size;
  each_item<A>(d, B * cut, [&](int64_t item, Workplace<A>& work) {
    forward_item<A>(d, tile_at(d.shape, TILE, item), work, state_at(states + item * size, d.shape));
  });

  A* stats = static_cast<A*>(out.stats);
  for (int i = 0; i < d.targets; ++i) sums[i] = 0;
  for (int64_t b = 0; b < B; ++b) {
    State s = state_at(states + b * cut * size, d.shape);
    for (int64_t i = 1; i < cut; ++i) merge(s, state_at(states + (b * cut + i) * size, d.shape), T, V);
    for (int v = 0; v < V; ++v) {
      A* at = stats + student_stats(d.shape, v, b);
      at[0] = A(s.student[v].max / rate_of<A>(d, -1));
      at[1] = A(__builtin_log(s.student[v].sum));
    }
    for (int t = 0; t < T; ++t) {
      const Teacher& teacher = d.teacher[t];
      A* at = stats + teacher_stats(d.shape, t, b);
      at[0] = A(s.teacher[t].max / rate_of<A>(d, t));
      at[1] = A(s.teacher[t].sum);
      double rows = 0;
      for (int v = 0; v < V; ++v)
        if (d.pairs[t * V + v] != 0)
          rows += d.pairs[t * V + v] *
                  cross_entropy(s.dot[t * V + v], s.teacher[t], s.student[v], teacher.probabilities);
      sums[teacher.target] += rows * row_weight<A>(teacher, b);
    }
  }
  double loss = 0;
  for (int i = 0; i < d.targets; ++i) {
    double term = B ? sums[i] / B : 0;
    static_cast<A*>(out.terms)[i] = A(term);
    loss += weight<A>(d, i) * term;
  }
  *static_cast<A*>(out.loss) = A(loss);
}

// gradient[v] = f_v 2^(..) - sum_t c_tv q_t: f_v = grad_output n_v / (tau_s B sum_v) and
// c_tv = grad_output pairs[t,v] weight row_weight / (tau_s B), n_v the sum of a column of pairs.
struct Coefficients {
  double *pair, *student;  // c [T, V], f [V]
};

template <typename A>
Coefficients coefficients(const Distill& d, const Backward& io, int64_t b, double* at) {
  const int T = d.shape.teachers, V = d.shape.views;
  const A* stats = static_cast<const A*>(io.stats);
  const Coefficients out = {at, at + T * V};
  const double scale =
      double(*static_cast<const A*>(io.grad_output)) * rate_of<A>(d, -1) / double(d.shape.images);
  for (int v = 0; v < V; ++v) {
    for (int t = 0; t < T; ++t) out.pair[t * V + v] = scale * coefficient<A>(d, t, v, b);
    const double log_sum = stats[student_stats(d.shape, v, b) + 1];
    out.student[v] = scale * mass<A>(d, stats, v, b) * __builtin_exp(-log_sum);
  }
  return out;
}

// What the gradient of one view in one block is made of.
template <typename A>
struct Mix {
  A max, scale, factor;
  const A* q[GROUP];
  A c[GROUP];
  int count;
  Next next;
};

template <typename A, typename Row>
int64_t gradient(const Mix<A>& m, int64_t n, Row row) {
  return with_count(m.count, [&](auto N) {
    return gradient_block<N>(row, m.max, m.scale, m.factor, n, m.q, m.c, m.next);
  });
}

// By way of scratch: any type, stride and alignment, and teacher rows beyond the first group.
template <typename A>
void gradient_in_scratch(const Distill& d, Block at, int v, int t, const Mix<A>& m, const double* pair,
                         const A* const* q, A* wide, A* g) {
  const A* x = values<A>(d.student[v], at.image, at.k0, at.n, wide);
  const int64_t done = gradient(m, at.n, Scratch<A>{x, g});
  if (done < at.n) {  // the last values, padded
    constexpr int64_t PAIR = 2 * LANES<A>;
    alignas(WIDTH) A rest[(1 + GROUP) * PAIR] = {};
    Mix<A> padded = m;
    for (int i = 0; i <= m.count; ++i)
      std::memcpy(rest + i * PAIR, (i ? m.q[i - 1] : x) + done, (at.n - done) * sizeof(A));
    for (int i = 0; i < m.count; ++i) padded.q[i] = rest + (i + 1) * PAIR;
    gradient(padded, PAIR, Scratch<A>{rest, g + done});
  }
  for (; t < d.shape.teachers; ++t) {
    const A c = A(pair[t * d.shape.views + v]);
    if (d.pairs[t * d.shape.views + v] == 0) continue;
    for (int64_t k = 0; k < at.n; ++k) g[k] -= c * q[t][k];
  }
}

// Whether gradients are streamed to their place, which is aligned then, for blocks of whole pairs of
// vectors. A view with more than GROUP teacher rows would have to read them back.
template <typename A>
bool streams(const Distill& d, const Backward& io) {
  const Rows& student = d.student[0];
  const int64_t item = item_size(student.type);
  for (int v = 0; v < d.shape.views; ++v) {
    int t = 0, rows[GROUP];
    next_group(d, v, &t, rows);
    if (next_group(d, v, &t, rows)) return false;
  }
  return (item == sizeof(A) || student.type == BF16) && student.column == 1 &&
         d.shape.columns * item % WIDTH == 0 && reinterpret_cast<uintptr_t>(io.gradient) % WIDTH == 0;
}

template <typename A>
void backward_student(const Distill& d, const Backward& io, Block at, int v, Coefficients f, A scale,
                      const A* const* q, A* wide, A* g, bool streamed) {
  const int T = d.shape.teachers, V = d.shape.views;
  const Rows& student = d.student[v];
  Mix<A> m = {static_cast<const A*>(io.stats)[student_stats(d.shape, v, at.image)], scale,
              A(f.student[v]), {}, {}, 0, next_row(d, at, T + v + AHEAD)};
  int t = 0, rows[GROUP];
  m.count = next_group(d, v, &t, rows);
  for (int i = 0; i < m.count; ++i) m.q[i] = q[rows[i]], m.c[i] = A(f.pair[rows[i] * V + v]);

  const int64_t place = (v * d.shape.images + at.image) * d.shape.columns + at.k0;
  char* to = static_cast<char*>(io.gradient) + place * item_size(student.type);
  if (!has_pair(d, v)) {  // the view may hold NaN
    std::memset(to, 0, at.n * item_size(student.type));
    return;
  }
  const char* from = address(student, at.image, at.k0);
  if (streamed && item_size(student.type) == sizeof(A)) {
    gradient(m, at.n, Memory<A>{{reinterpret_cast<const A*>(from), reinterpret_cast<A*>(to)}});
    return;
  }
  if constexpr (sizeof(A) == 4) {
    if (streamed) {
      const PairedBf16 row = {reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to)};
      gradient(m, at.n, row);
      return;
    }
  }
  gradient_in_scratch(d, at, v, t, m, f.pair, q, wide, g);
  narrow(student.type, at.n, g);
  stream(to, g, at.n * item_size(student.type));
}

template <typename A>
const A* backward_teacher(const Distill& d, const Backward& io, Block at, int t, A* own) {
  const Teacher& teacher = d.teacher[t];
  const A* x = values<A>(teacher.rows, at.image, at.k0, at.n, own);
  if (teacher.probabilities) return x;
  const A* stats = static_cast<const A*>(io.stats) + teacher_stats(d.shape, t, at.image);
  with_centre<A>(teacher, at, x, [&](auto row) {
    return exponentials(row, stats[0], A(rate_of<A>(d, t) * LOG2_E), A(1) / stats[1], at.n, own,
                        next_row(d, at, t + AHEAD));
  });
  return own;
}

// Scratch as in forward, and a block for the gradient.
template <typename A>
void backward_item(const Distill& d, const Backward& io, Tile at, Workplace<A>& work) {
  const int T = d.shape.teachers, V = d.shape.views;
  const Coefficients f = coefficients<A>(d, io, at.image, work.state);
  const A scale = A(rate_of<A>(d, -1) * LOG2_E);
  A *wide = work.scratch + T * BLOCK, *g = wide + BLOCK;
  const bool whole = streams<A>(d, io);
  for (int64_t k = at.begin; k < at.end; k += BLOCK) {
    const Block block = {at.image, k, k + BLOCK < at.end ? BLOCK : at.end - k};
    const bool streamed = whole && block.n % (2 * LANES<A>) == 0;
    for (int t = 0; t < T; ++t) {
      A* own = work.scratch + t * BLOCK;
      const A* q = backward_teacher<A>(d, io, block, t, own);
      work.rows[t] = in_order(streamed && d.student[0].type == BF16, q, block.n, own);
    }
    for (int v = 0; v < V; ++v)
      backward_student(d, io, block, v, f, scale, work.rows, wide, g, streamed);
  }
  stream_fence();
}

template <typename A>
void backward(const Distill& d, const Backward& io) {
  each_item<A>(d, d.shape.images * tiles(d.shape, TILE), [&](int64_t item, Workplace<A>& work) {
    backward_item<A>(d, io, tile_at(d.shape, TILE, item), work);
  });
}

// Rows are added in order, a tile of columns at a time: bits do not depend on the threads. A chain of
// fp32 additions is ended after CHAIN rows and goes on in double.
template <typename A>
void column_mean_tile(const ColumnMean& m, int64_t begin, int64_t n) {
  constexpr int L = LANES<A>;
  constexpr int64_t CHAIN = 16;
  alignas(WIDTH) A sum[BLOCK] = {}, wide[BLOCK];
  double total[BLOCK] = {};
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
  parallel(m.threads, (m.columns + BLOCK - 1) / BLOCK, [&](int64_t i, int) {
    const int64_t begin = i * BLOCK, rest = m.columns - begin;
    column_mean_tile<A>(m, begin, rest < BLOCK ? rest : BLOCK);
  });
}

void run_column_mean(const ColumnMean& m) {
  m.rows.type == F64 ? column_mean<double>(m) : column_mean<float>(m);
}

void run_forward(const Distill& d, const Forward& io) {
  d.student[0].type == F64 ? forward<double>(d, io) : forward<float>(d, io);
}

void run_backward(const Distill& d, const Backward& io) {
  d.student[0].type == F64 ? backward<double>(d, io) : backward<float>(d, io);
}

}  // namespace

extern const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL);
const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL) = {MOKD_STRING(MOKD_LEVEL), run_forward, run_backward,
                                                  run_column_mean};

}  // namespace mokd::cpu
