// distill_cross_entropy on the CPU. Compiled once for every x86-64 level (MOKD_LEVEL), so everything
// has internal linkage: of inline functions the linker would keep one copy for all levels.
//
// Forward reads every student and teacher row once (4 (V + T) B K bytes in fp32) and keeps
// 2 (V + T) B numbers; backward reads them once more and writes the gradient once. Work is cut into
// (image, tile of columns); tiles are merged in index order, so the thread count changes no bit.
// Within a tile, blocks of columns stay in the nearest caches, and while one row is worked on the next is
// fetched. The exponentials of a teacher row are kept there for all its views; of one that has a single view,
// as in MOKD's search, both rows are read side by side and nothing is kept.
// The maximum is subtracted before the temperature divides: a large common offset costs no digit.
// The mean of the teacher rows, to which their centre moves, can be made of the same read: some images are
// taken together then, tile by tile, and their rows added up (mean.h).
#include "distill.h"

#include <vector>

#include "loops.h"
#include "mean.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int64_t TILE = 4 * BLOCK;  // columns of one piece of work

// a takes in b, its right neighbour. Maxima seldom move (running_maximum): `decay` is then mostly 1.
// Without the condition these took 4 % of MOKD's call with search, where most rows have one view only.
void merge(const Distill& d, State a, State b) {
  const int T = d.shape.teachers, V = d.shape.views;
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      if (d.pairs[t * V + v] != 0)
        a.dot[t * V + v] = merge_dots(a.dot[t * V + v], a.teacher[t], a.student[v],
                                      b.dot[t * V + v], b.teacher[t], b.student[v]);
  for (int t = 0; t < T; ++t) a.teacher[t] = merge(a.teacher[t], b.teacher[t]);
  for (int v = 0; v < V; ++v) a.student[v] = merge(a.student[v], b.student[v]);
}

// A call, and what follows from its pairs and types.
struct Call : Distill {
  explicit Call(const Distill& d);
  std::vector<int> lone;           // [V]: the teacher row that is read beside this view, or -1
  std::vector<bool> kept;          // [T]: the others, whose exponentials are kept for all their views
  std::vector<const Rows*> order;  // the rows as they are visited: teachers that are kept, then each
  std::vector<int> turn;           // view after its lone row; [T + V]: where each stands in `order`
};

Call::Call(const Distill& d) : Distill(d), lone(shape.views, -1), kept(shape.teachers, true) {
  const int T = shape.teachers, V = shape.views;
  turn.resize(T + V);
  for (int t = 0; t < T; ++t) {
    int views = 0, view = 0;
    for (int v = 0; v < V; ++v)
      if (pairs[t * V + v] != 0) ++views, view = v;
    const Rows& rows = teacher[t].rows;
    const bool alike = rows.type == student[0].type && rows.column == 1 && student[0].column == 1;
    if (views == 1 && lone[view] < 0 && alike && !teacher[t].center && !teacher[t].probabilities)
      lone[view] = t, kept[t] = false;
  }
  const auto visit = [&](int row, const Rows& rows) {
    turn[row] = int(order.size());
    order.push_back(&rows);
  };
  for (int t = 0; t < T; ++t)
    if (kept[t]) visit(t, teacher[t].rows);
  for (int v = 0; v < V; ++v) {
    if (lone[v] >= 0) visit(lone[v], teacher[lone[v]].rows);
    visit(T + v, student[v]);
  }
}

template <typename A>
double rate_of(const Distill& d, int t) {  // 1 / tau in double: a maximum comes back exactly
  return 1 / double(temperature<A>(d, t));
}

// Up to GROUP teacher rows from t on that are paired with view v, but `lone`; t moves behind the last one.
int next_group(const Distill& d, int v, int lone, int* t, int* found) {
  int count = 0;
  for (; *t < d.shape.teachers && count < GROUP; ++*t)
    if (d.pairs[*t * d.shape.views + v] != 0 && *t != lone) found[count++] = *t;
  return count;
}

// A block of columns of one image, and where the one that follows begins.
struct Block {
  int64_t image, k0, n, next_image, next_k;
};

// What to fetch while teacher row t, or view t - T, is worked on.
Next next_row(const Call& d, Block at, int t) {
  const int all = d.shape.teachers + d.shape.views;
  int row = d.turn[t] + AHEAD;
  const bool within = row < all;
  int64_t image = within ? at.image : at.next_image, k = within ? at.k0 : at.next_k - at.n;
  for (; row >= all; row -= all) k += at.n;  // beyond the last row: of the blocks that follow
  const Rows& rows = *d.order[row];
  return {address(rows, image, k), item_size(rows.type) * (rows.column == 1)};
}

// What a thread keeps of a teacher row: the exponentials of a block of columns and, before them, of the
// HALO last columns of the block to the left. Or as a tile of a `PairedBf16`, the columns in two planes.
template <typename A>
constexpr int64_t HALO = 2 * LANES<A>;
template <typename A>
constexpr int64_t ROW = BLOCK + HALO<A>;
constexpr int64_t PLANE = ROW<float> / 2;

// Where the block's first column stands.
template <typename A>
A* first_column(A* kept, bool pairs) {
  return kept + (pairs ? HALO<A> / 2 : HALO<A>);
}

// Before the next block: what was last becomes the halo.
template <typename A>
void keep_halo(A* kept, bool pairs) {
  constexpr int64_t HALF = HALO<A> / 2;
  if (!pairs) std::memcpy(kept, kept + BLOCK, HALO<A> * sizeof(A));
  for (int64_t plane = 0; pairs && plane < ROW<A>; plane += PLANE)
    std::memcpy(kept + plane, kept + plane + BLOCK / 2, HALF * sizeof(A));
}

inline PairedBf16 paired_row(const Rows& rows, Block at) {
  return {reinterpret_cast<const uint16_t*>(address(rows, at.image, at.k0)), nullptr, 0, PLANE};
}

// Whether a student's block is read as `PairedBf16`, which takes whole pairs of vectors.
template <typename A>
bool paired(const Distill& d, Block at) {
  const Rows& student = d.student[0];
  return sizeof(A) == 4 && student.type == BF16 && student.column == 1 && at.n % HALO<A> == 0;
}

// The numbers of a block where a student's loop finds them: where they are, or split into a tile.
template <typename A>
const A* in_order(bool pairs, const A* x, int64_t n, A* own) {
  if constexpr (sizeof(A) == 4)
    if (pairs) return split(x, n, own, PLANE);
  return x;
}

// Calls f with a teacher row less its centre and the place of its exponentials; returns where a student's
// loop finds these.
template <typename A, typename F>
const A* with_teacher(const Teacher& teacher, Block at, bool pairs, A* own, A* wide, const F& f) {
  const A* center = static_cast<const A*>(teacher.center);
  if constexpr (sizeof(A) == 4) {
    if (pairs && teacher.rows.type == BF16 && teacher.rows.column == 1 && at.n % HALO<A> == 0) {
      const PairedBf16 row = paired_row(teacher.rows, at);
      center ? f(CentredBf16{row, center + at.k0}, own) : f(row, own);
      return own;
    }
  }
  A* to = pairs ? wide : own;
  const Plain<A> row = {values<A>(teacher.rows, at.image, at.k0, at.n, to), nullptr, 0};
  center ? f(Centred<A>{row, center + at.k0}, to) : f(row, to);
  return in_order(pairs, to, at.n, own);
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
Partial forward_teacher(const Call& d, Block at, int t, A* own, A* wide, const A** e,
                        const Partial* before) {
  const Teacher& teacher = d.teacher[t];
  const bool pairs = paired<A>(d, at);
  if (teacher.probabilities) {
    const A* x = values<A>(teacher.rows, at.image, at.k0, at.n, pairs ? wide : own);
    *e = in_order(pairs, x, at.n, own);
    return {0, sum(x, at.n)};
  }
  const double rate = rate_of<A>(d, t);
  const Next next = next_row(d, at, t);
  Partial sum;
  *e = with_teacher<A>(teacher, at, pairs, own, wide, [&](auto row, A* to) {
    const A max = running_maximum<A>(row, at.n, before, rate);
    sum = {max * rate, exponentials(row, max, A(rate * LOG2_E), at.n, to, next)};
  });
  return sum;
}

// One view with all its teacher rows; returns the sum of its lone one, if any.
template <typename A, typename Row, typename Own>
A forward_student(const Call& d, Block at, int v, Row row, Own own, const A* const* e, State out,
                  const Partial* before) {
  const int V = d.shape.views, T = d.shape.teachers;
  const double rate = rate_of<A>(d, -1);
  const A max = running_maximum<A>(row, at.n, before, rate), scale = A(rate * LOG2_E);
  const Next next = next_row(d, at, T + v);
  for (int t = 0; t < T; ++t) out.dot[t * V + v] = 0;
  int t = 0, rows[GROUP + 1];
  A total, mass = 0;
  const auto group = [&](int count, auto beside) {
    const A* near[GROUP];
    A dots[GROUP + 1];
    for (int i = 0; i < count; ++i) near[i] = e[rows[i]];
    total = with_count(count, [&](auto N) {
      return student_block<N>(row, max, scale, at.n, near, dots, next, beside, &mass);
    });
    rows[count] = d.lone[v];
    for (int i = 0; i < count + beside.exists; ++i) out.dot[rows[i] * V + v] = dots[i] * rate;
  };
  group(next_group(d, v, d.lone[v], &t, rows), own);
  const A sum = mass;
  while (const int count = next_group(d, v, d.lone[v], &t, rows)) group(count, NoLone());
  out.student[v] = {max * rate, total};
  return sum;
}

// Where one thread works: blocks of numbers for the scratch, a State and pointers to teacher rows.
template <typename A>
struct Workplace {
  A* scratch;
  double* state;
  const A** rows;
  Workplace(char* at, const Shape& shape)
      : scratch(reinterpret_cast<A*>(at)),
        state(reinterpret_cast<double*>(scratch + (shape.teachers + 2) * ROW<A>)),
        rows(reinterpret_cast<const A**>(state + state_size(shape))) {}
  static int64_t bytes(const Shape& shape) {
    const int64_t size = (shape.teachers + 2) * ROW<A> * sizeof(A) + state_size(shape) * sizeof(double) +
                         shape.teachers * sizeof(A*);
    return (size / 64 + 1) * 64;
  }
};

// Scratch: what is kept of every teacher row, then blocks to widen a student and its lone row in. `next` is
// the tile that follows. sum [K] or null: where the teacher rows are added, or begin to be with `fresh`.
template <typename A>
void forward_item(const Call& d, Tile at, Tile next, Workplace<A>& work, State state, A* sum, bool fresh) {
  const int T = d.shape.teachers, V = d.shape.views;
  A* wide = work.scratch + T * ROW<A>;
  for (int64_t k = at.begin; k < at.end; k += BLOCK) {
    const int64_t n = k + BLOCK < at.end ? BLOCK : at.end - k;
    const bool first = k == at.begin, last = k + n == at.end;
    const Block block = {at.image, k, n, last ? next.image : at.image, last ? next.begin : k + n};
    if (sum) add_teachers(d, at.image, k, n, fresh, work.scratch, sum + k);
    State out = first ? state : state_at(work.state, d.shape);
    const bool pairs = paired<A>(d, block);
    for (int t = 0; t < T; ++t)
      if (d.kept[t])
        out.teacher[t] = forward_teacher(d, block, t, first_column(work.scratch + t * ROW<A>, pairs), wide,
                                         &work.rows[t], first ? nullptr : &state.teacher[t]);
    for (int v = 0; v < V; ++v) {
      const Rows& student = d.student[v];
      const bool alone = d.lone[v] >= 0;
      const Rows& own = alone ? d.teacher[d.lone[v]].rows : student;
      const Partial* before = first ? nullptr : &state.student[v];
      const auto run = [&](auto x, auto u) {
        if (!alone) {
          forward_student<A>(d, block, v, x, NoLone(), work.rows, out, before);
          return;
        }
        const int t = d.lone[v];
        const double rate = rate_of<A>(d, t);
        const A max = running_maximum<A>(u, block.n, first ? nullptr : &state.teacher[t], rate);
        const Lone<A, decltype(u)> lone = {u, max, A(rate * LOG2_E), next_row(d, block, t)};
        out.teacher[t] = {max * rate, forward_student<A>(d, block, v, x, lone, work.rows, out, before)};
      };
      if constexpr (sizeof(A) == 4) {
        if (pairs) {
          run(paired_row(student, block), paired_row(own, block));
          continue;
        }
      }
      const A* x = values<A>(student, at.image, k, block.n, wide);
      const A* u = alone ? values<A>(own, at.image, k, block.n, wide + ROW<A>) : x;
      run(Plain<A>{x, nullptr, 0}, Plain<A>{u, nullptr, 0});
    }
    if (!first) merge(d, state, out);
  }
}

// `parallel` with a workplace for each thread.
template <typename A, typename Work>
void each_item(const Distill& d, int64_t items, const Work& work) {
  const int64_t bytes = Workplace<A>::bytes(d.shape);
  const Buffer memory(bytes * (d.threads > 1 ? d.threads : 1));
  parallel(d.threads, items, [&](int64_t item, int thread) {
    Workplace<A> place(memory.get() + thread * bytes, d.shape);
    work(item, place);
  });
}

// Loss, terms and stats from the state of every image.
template <typename A>
void finish(const Distill& d, const Forward& out, double* states, int64_t step, double* sums) {
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images;
  A* stats = static_cast<A*>(out.stats);
  for (int i = 0; i < d.targets; ++i) sums[i] = 0;
  for (int64_t b = 0; b < B; ++b) {
    const State s = state_at(states + b * step, d.shape);
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

template <typename A>
void forward(const Call& d, const Forward& out, double* running, Chunk chunk) {
  const int64_t B = d.shape.images, cut = tiles(d.shape, TILE), size = state_size(d.shape);
  const Buffer memory((B * cut * size + d.targets) * sizeof(double));
  double *states = reinterpret_cast<double*>(memory.get()), *sums = states + B * cut * size;
  const auto work_on = [&](int64_t item, int64_t next, Workplace<A>& work, A* sum, bool fresh) {
    forward_item<A>(d, tile_at(d.shape, TILE, item), tile_at(d.shape, TILE, next), work,
                    state_at(states + item * size, d.shape), sum, fresh);
  };
  const RowSums<A> rows(d);
  const int64_t groups = rows.groups(), threads = d.threads > 1 ? d.threads : 1;
  // Images are apart where groups of them cannot be shared out to the threads without 1/10 of waiting.
  const int64_t rounds = (groups * cut + threads - 1) / threads;
  const bool together = d.mean && 10 * rounds * threads <= 11 * groups * cut;
  if (together)
    each_item<A>(d, cut * groups, [&](int64_t i, Workplace<A>& work) {  // a tile of every group, then the next
      const Images images = rows.images(i % groups);
      for (int64_t b = images.begin; b < images.end; ++b)
        work_on(b * cut + i / groups, b + 1 < B ? (b + 1) * cut + i / groups : i / groups + 1, work,
                rows.of(i % groups), b == images.begin);
    });
  else
    each_item<A>(d, B * cut, [&](int64_t i, Workplace<A>& work) { work_on(i, i + 1, work, nullptr, false); });
  if (d.mean && !together) {
    const int64_t blocks = (d.shape.columns + BLOCK - 1) / BLOCK;
    each_item<A>(d, groups * blocks, [&](int64_t item, Workplace<A>& work) {
      const int64_t group = item / blocks;
      const Images images = rows.images(group);
      const Tile at = tile_at(d.shape, BLOCK, item % blocks);
      for (int64_t b = images.begin; b < images.end; ++b)
        add_teachers(d, b, at.begin, at.end - at.begin, b == images.begin, work.scratch, rows.of(group) + at.begin);
    });
  }
  if (d.mean) rows.write_mean();
  for (int64_t b = 0; b < B; ++b) {
    double* own = states + b * cut * size;
    for (int64_t i = 1; i < cut; ++i)
      merge(d, state_at(own, d.shape), state_at(own + i * size, d.shape));
    if (!running) continue;
    double* all = running + b * size;
    if (chunk.first)
      std::memcpy(all, own, size * sizeof(double));
    else
      merge(d, state_at(all, d.shape), state_at(own, d.shape));
  }
  if (chunk.last) finish<A>(d, out, running ? running : states, running ? size : cut * size, sums);
}

// gradient[v] = f_v 2^(..) - sum_t c_tv e_t: f_v = grad_output n_v / (tau_s B sum_v) and
// c_tv = grad_output pairs[t,v] weight row_weight / (tau_s B sum_t), n_v the sum of a column of pairs and
// e_t the exponentials of a teacher row, or given probabilities; sum_t is 1 then.
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
    for (int t = 0; t < T; ++t)
      out.pair[t * V + v] = scale * coefficient<A>(d, t, v, b) /
                            (d.teacher[t].probabilities ? 1 : stats[teacher_stats(d.shape, t, b) + 1]);
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
  A c[GROUP + 1];
  int count;
  Next next;
};

template <typename A, typename Row, typename Own>
int64_t gradient(const Mix<A>& m, int64_t n, Row row, Own own) {
  return with_count(m.count, [&](auto N) {
    return gradient_block<N>(row, m.max, m.scale, m.factor, n, m.q, m.c, m.next, own);
  });
}

// By way of scratch: any type, stride and alignment, and teacher rows beyond the first group.
template <typename A>
void gradient_in_scratch(const Distill& d, Block at, int v, int t, const Mix<A>& m, const double* pair,
                         const A* const* q, A* wide, A* g) {
  const A* x = values<A>(d.student[v], at.image, at.k0, at.n, wide);
  const int64_t done = gradient(m, at.n, Plain<A>{x, g, 0}, NoLone());
  if (done < at.n) {  // the last values, padded
    constexpr int64_t PAIR = HALO<A>;
    alignas(WIDTH) A rest[(1 + GROUP) * PAIR] = {};
    Mix<A> padded = m;
    for (int i = 0; i <= m.count; ++i)
      std::memcpy(rest + i * PAIR, (i ? m.q[i - 1] : x) + done, (at.n - done) * sizeof(A));
    for (int i = 0; i < m.count; ++i) padded.q[i] = rest + (i + 1) * PAIR;
    gradient(padded, PAIR, Plain<A>{rest, g + done, 0}, NoLone());
  }
  for (; t < d.shape.teachers; ++t) {
    const A c = A(pair[t * d.shape.views + v]);
    if (d.pairs[t * d.shape.views + v] == 0) continue;
    for (int64_t k = 0; k < at.n; ++k) g[k] -= c * q[t][k];
  }
}

// Whether gradients go from registers to their place, of tiles no narrower than a pair of vectors. A view
// with more than GROUP teacher rows would have to read them back.
template <typename A>
bool direct(const Call& d, Tile at) {
  const Rows& student = d.student[0];
  for (int v = 0; v < d.shape.views; ++v) {
    int t = 0, rows[GROUP];
    next_group(d, v, d.lone[v], &t, rows);
    if (next_group(d, v, d.lone[v], &t, rows)) return false;
  }
  return (item_size(student.type) == sizeof(A) || student.type == BF16) && student.column == 1 &&
         at.end - at.begin >= HALO<A>;
}

// Cache lines are written whole, past the caches: the gradient is cut where its lines end, not where the
// block does, so that a block begins up to a line early and leaves its end to the next one. Of the lines
// at the edges of a tile, which the neighbours write too, the tile's columns are written by themselves.
// They come last: until then the lines are there, and no store waits for one.
template <typename Stream, typename A, typename Row, typename Own>
void gradient_in_place(const Mix<A>& m, Tile tile, Block at, Row row, Own own) {
  constexpr int64_t PAIR = HALO<A>, ITEM = sizeof(*row.g);
  const auto line = [&](int64_t k) {  // where the line of column k begins
    return k - int64_t(reinterpret_cast<uintptr_t>(row.g + k) % WIDTH) / ITEM;
  };
  const auto part = [&](int64_t k, int64_t n, auto r, auto* g) {
    Own u = own;
    r.skip(k), r.g = g;
    if constexpr (Own::exists) u.row.skip(k);
    return k + gradient(m, n, r, u);
  };
  const auto edge = [&](int64_t k, int64_t begin, int64_t end) {  // of the pair of vectors from k on
    alignas(WIDTH) char g[PAIR * ITEM];
    part(k, PAIR, row, reinterpret_cast<decltype(row.g)>(g));
    std::memcpy(row.g + begin, g + (begin - k) * ITEM, (end - begin) * ITEM);
  };
  const bool last = at.k0 + at.n == tile.end, first = at.k0 == tile.begin && line(0) < 0;
  const int64_t begin = line(0) + (first ? PAIR : 0);
  if (first) __builtin_prefetch(row.g, 1);
  if (last) __builtin_prefetch(row.g + at.n - 1, 1);
  const int64_t done = part(begin, line(at.n) - begin, Stream{row}, row.g + begin);
  if (first) edge(0, 0, begin);
  if (last && done < at.n) edge(at.n - PAIR, done, at.n);
}

template <typename A>
void backward_student(const Call& d, const Backward& io, Tile tile, Block at, int v, Coefficients f,
                      A scale, const A* const* q, A* wide, A* g, bool in_place) {
  const int T = d.shape.teachers, V = d.shape.views, lone = in_place ? d.lone[v] : -1;
  const Rows& student = d.student[v];
  const A* stats = static_cast<const A*>(io.stats);
  Mix<A> m = {stats[student_stats(d.shape, v, at.image)], scale, A(f.student[v]), {}, {}, 0,
              next_row(d, at, T + v)};
  int t = 0, rows[GROUP];
  m.count = next_group(d, v, lone, &t, rows);
  for (int i = 0; i < m.count; ++i) m.q[i] = q[rows[i]], m.c[i] = A(f.pair[rows[i] * V + v]);

  const int64_t place = (v * d.shape.images + at.image) * d.shape.columns + at.k0;
  char* to = static_cast<char*>(io.gradient) + place * item_size(student.type);
  if (!has_pair(d, v)) {  // the view may hold NaN
    std::memset(to, 0, at.n * item_size(student.type));
    return;
  }
  if (!in_place) {
    gradient_in_scratch(d, at, v, t, m, f.pair, q, wide, g);
    narrow(student.type, at.n, g);
    const int64_t bytes = at.n * item_size(student.type);
    io.reused ? void(std::memcpy(to, g, bytes)) : stream(to, g, bytes);
    return;
  }
  const auto put = [&](auto row, auto u, auto written) {
    using Written = decltype(written);
    if (lone < 0) return gradient_in_place<Written>(m, tile, at, row, NoLone());
    m.c[m.count] = A(f.pair[lone * V + v]);
    const A* own = stats + teacher_stats(d.shape, lone, at.image);
    gradient_in_place<Written>(
        m, tile, at, row,
        Lone<A, decltype(u)>{u, own[0], A(rate_of<A>(d, lone) * LOG2_E), next_row(d, at, lone)});
  };
  const auto run = [&](auto row, auto u, auto streamed) {
    io.reused ? put(row, u, row) : put(row, u, streamed);
  };
  const Rows& own = lone < 0 ? student : d.teacher[lone].rows;
  if constexpr (sizeof(A) == 4) {
    if (student.type == BF16) {
      PairedBf16 row = paired_row(student, at);
      row.g = reinterpret_cast<uint16_t*>(to);
      run(row, paired_row(own, at), StreamedBf16());
      return;
    }
  }
  const auto in_memory = [&](const Rows& rows) {
    return reinterpret_cast<const A*>(address(rows, at.image, at.k0));
  };
  run(Plain<A>{in_memory(student), reinterpret_cast<A*>(to), 0}, Plain<A>{in_memory(own), nullptr, 0},
      Streamed<A>());
}

template <typename A>
const A* backward_teacher(const Call& d, const Backward& io, Block at, int t, bool pairs, A* own,
                          A* wide) {
  const Teacher& teacher = d.teacher[t];
  if (teacher.probabilities)
    return in_order(pairs, values<A>(teacher.rows, at.image, at.k0, at.n, pairs ? wide : own), at.n, own);
  const A* stats = static_cast<const A*>(io.stats) + teacher_stats(d.shape, t, at.image);
  return with_teacher<A>(teacher, at, pairs, own, wide, [&](auto row, A* to) {
    exponentials(row, stats[0], A(rate_of<A>(d, t) * LOG2_E), at.n, to, next_row(d, at, t));
  });
}

// Scratch as in forward, and a block for the gradient.
template <typename A>
void backward_item(const Call& d, const Backward& io, Tile at, Workplace<A>& work) {
  const int T = d.shape.teachers, V = d.shape.views;
  const Coefficients f = coefficients<A>(d, io, at.image, work.state);
  const A scale = A(rate_of<A>(d, -1) * LOG2_E);
  A *wide = work.scratch + T * ROW<A>, *g = wide + ROW<A>;
  const bool in_place = direct<A>(d, at), pairs = in_place && d.student[0].type == BF16;
  for (int64_t k = at.begin; k < at.end; k += BLOCK) {
    const int64_t n = k + BLOCK < at.end ? BLOCK : at.end - k;
    const Block block = {at.image, k, n, at.image, k + n};  // a tile of an image, then its next
    for (int t = 0; t < T; ++t) {
      if (in_place && !d.kept[t]) continue;
      A* kept = work.scratch + t * ROW<A>;
      if (k != at.begin) keep_halo(kept, pairs);
      work.rows[t] = backward_teacher(d, io, block, t, pairs, first_column(kept, pairs), wide);
    }
    for (int v = 0; v < V; ++v)
      backward_student(d, io, at, block, v, f, scale, work.rows, wide, g, in_place);
  }
  stream_fence();
}

template <typename A>
void backward(const Call& d, const Backward& io) {
  each_item<A>(d, d.shape.images * tiles(d.shape, TILE), [&](int64_t item, Workplace<A>& work) {
    backward_item<A>(d, io, tile_at(d.shape, TILE, item), work);
  });
}

void run_column_mean(const ColumnMean& m) {
  m.rows.type == F64 ? column_mean<double>(m) : column_mean<float>(m);
}

void run_forward(const Distill& d, const Forward& io, double* running, Chunk chunk) {
  d.student[0].type == F64 ? forward<double>(Call(d), io, running, chunk)
                           : forward<float>(Call(d), io, running, chunk);
}

void run_backward(const Distill& d, const Backward& io) {
  d.student[0].type == F64 ? backward<double>(Call(d), io) : backward<float>(Call(d), io);
}

}  // namespace

extern const SearchKernels MOKD_JOIN(search_kernels_, MOKD_LEVEL);  // of search.cpp
void MOKD_JOIN(augment_, MOKD_LEVEL)(const Augment&);  // of augment.cpp
void MOKD_JOIN(clip_, MOKD_LEVEL)(const Clip&);        // of clip.cpp
void MOKD_JOIN(update_, MOKD_LEVEL)(const Update&);    // of update.cpp
extern const PrototypeKernels MOKD_JOIN(prototype_kernels_, MOKD_LEVEL);  // of prototypes.cpp
extern const PrototypeLinearKernels<float> MOKD_JOIN(prototype_linear_kernels_, MOKD_LEVEL);  // of ..._fp32.cpp
extern const BatchNormKernels MOKD_JOIN(batch_norm_kernels_, MOKD_LEVEL);  // of batch_norm.cpp
extern const BlockKernels MOKD_JOIN(block_kernels_, MOKD_LEVEL);          // of block.cpp
extern const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL);
const Kernels MOKD_JOIN(kernels_, MOKD_LEVEL) = {MOKD_STRING(MOKD_LEVEL), run_forward, run_backward,
                                                  run_column_mean,
                                                  &MOKD_JOIN(search_kernels_, MOKD_LEVEL),
                                                  MOKD_JOIN(augment_, MOKD_LEVEL),
                                                  &MOKD_JOIN(prototype_kernels_, MOKD_LEVEL),
                                                  &MOKD_JOIN(prototype_linear_kernels_, MOKD_LEVEL),
                                                  MOKD_JOIN(clip_, MOKD_LEVEL),
                                                  MOKD_JOIN(update_, MOKD_LEVEL),
                                                  &MOKD_JOIN(batch_norm_kernels_, MOKD_LEVEL),
                                                  &MOKD_JOIN(block_kernels_, MOKD_LEVEL)};

}  // namespace mokd::cpu
