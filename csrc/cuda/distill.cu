// distill_cross_entropy on CUDA. Formula and merges: csrc/core/distill.h, which the CPU runs too.
//
// A warp works on one piece: a tile of columns of one image. It reads the T teacher tiles once, keeps
// their exponentials in shared memory, each lane its own columns (so there is no barrier), and walks
// over the V student tiles, the next one already on its way.
//   forward   reads (T + V) B K, writes a State a piece; once all columns were read, `merge_tiles` joins
//             them in index order and `total` sums the images. No locks, no atomics: the same bits.
//   backward  reads (T + V) B K, writes V B K.
// Maxima are those of the logits, before the temperature: s - max is exact where s * 1/tau is not.
#include "distill.h"

#ifdef __CUDACC__
#include "launch.h"
#else
#include "emulator.h"  // tests/ops: the same kernels on a host, for machines without a GPU
#endif
#include "tile.h"

#include <stdexcept>
#include <string>

namespace mokd::cuda {

extern __shared__ uint4 shared[];

namespace {

// Threads of a block: of pieces (at most), and of the kernels after them. The blocks a multiprocessor
// that __launch_bounds__ asks for are the most that compile without spills for every architecture.
constexpr int THREADS = 128, MERGE_THREADS = 256;
constexpr double LOG2_E = 1.4426950408889634;

struct Parameters {
  Call call;
  Forward forward;
  Backward backward;
  int tile;
  double* states;       // State [B, tiles]: of the columns of this call, or in the end of all columns
  int64_t all;          // tiles of an image in the end
  double* image_terms;  // [targets, B]
};
static_assert(sizeof(Parameters) <= 4096, "more than a kernel takes");

template <typename S>
using Arithmetic = std::conditional_t<sizeof(S) == 8, double, float>;

// The piece of this warp; false past the last one.
__device__ __forceinline__ bool my_tile(const Parameters& p, Tile& at, int64_t& item) {
  item = int64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (item >= p.call.shape.images * tiles(p.call.shape, p.tile)) return false;
  at = tile_at(p.call.shape, p.tile, item);
  return true;
}

// x = logits - center of a teacher row, or its probabilities.
template <typename A>
__device__ __forceinline__ void load_teacher(const Teacher& teacher, Tile at, Lane<A>& x) {
  load(teacher.rows, at, x);
  if (!teacher.center) return;
  const Strip<A> center({teacher.center, F32, 0, 1}, at);  // the same for every image
  each_chunk<A>(center.n, [&](int c, int k) {
    uint4 words[Strip<A>::WORDS];
    A one[STEP];
    center.fetch(c, k, words);
    convert<A>(words, one);
#pragma unroll
    for (int j = 0; j < STEP; ++j) x.at[c][j] -= one[j];
  });
}

template <typename S>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 8 ? 3 : 5)
    forward_tiles(const __grid_constant__ Parameters p) {
  using A = Arithmetic<S>;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const A infinity = A(INFINITY);
  int64_t item;
  Tile at;
  if (!my_tile(p, at, item)) return;
  const int n = int(at.end - at.begin);
  const bool first = threadIdx.x % WARP == 0;
  State out = state_at(p.states + item * state_size(d.shape), d.shape);
  Kept<A> e(shared, T, p.tile);
  Lane<A> x;
  for (int t = 0; t < T; ++t) {
    const bool given = d.teacher[t].probabilities;
    load_teacher(d.teacher[t], at, x);
    pad(x, n, given ? A(0) : -infinity);
    const A inverse = inverse_temperature<A>(d, t), top = given ? A(0) : max_of(x, n);
    const A rate = inverse * A(LOG2_E);
    const A sum = sum_of(x, n, [&](A& u) { return u = given ? u : power_of_two((u - top) * rate); });
    e.put(t, x, n);
    if (first) out.teacher[t] = {double(top) * double(inverse), double(sum)};
  }
  const A inverse = inverse_temperature<A>(d, -1), rate = inverse * A(LOG2_E);
  Raw<S, A> next;
  fetch(d.student[0], at, next);
  for (int v = 0; v < V; ++v) {
    convert(next, n, x);
    if (v + 1 < V) fetch(d.student[v + 1], at, next);
    pad(x, n, -infinity);
    const A top = max_of(x, n);
    const A sum = sum_of(x, n, [&](A& z) { return power_of_two((z -= top) * rate); });
    if (first) out.student[v] = {double(top) * double(inverse), double(sum)};
    pad(x, n, A(0));  // -inf times the teacher's 0 would be NaN
    for (int t = 0; t < T; ++t) {
      const A sum = d.pairs[t * V + v] == 0 ? A(0) : dot(e, t, x, n);
      if (first) out.dot[t * V + v] = double(sum) * double(inverse);
    }
  }
}

// A pair of rows over some columns.
struct Pair {
  Partial teacher, student;
  double dot;
};

__device__ __forceinline__ Pair join(const Pair& a, const Pair& b) {  // b is the right neighbour
  return {merge(a.teacher, b.teacher), merge(a.student, b.student),
          merge_dots(a.dot, a.teacher, a.student, b.dot, b.teacher, b.student)};
}

__device__ __forceinline__ Partial from_lane_above(const Partial& x, int i) {
  return {__shfl_down_sync(0xffffffff, x.max, i), __shfl_down_sync(0xffffffff, x.sum, i)};
}

// A warp joins all tiles of a pair of image b, neighbours first; the result is that of lane 0.
__device__ Pair join_tiles(const Parameters& p, int64_t b, int t, int v) {
  const Shape& shape = p.call.shape;
  const int64_t count = p.all, run = (count + WARP - 1) / WARP, size = state_size(shape);
  const int lane = threadIdx.x % WARP, lanes = int((count + run - 1) / run);
  Pair all = {};
  for (int64_t i = lane * run; i < count && i < (lane + 1) * run; ++i) {
    State s = state_at(p.states + (b * count + i) * size, shape);
    Pair one = {s.teacher[t], s.student[v], s.dot[t * shape.views + v]};
    all = i == lane * run ? one : join(all, one);
  }
#pragma unroll
  for (int i = 1; i < WARP; i *= 2) {
    Pair right = {from_lane_above(all.teacher, i), from_lane_above(all.student, i),
                  __shfl_down_sync(0xffffffff, all.dot, i)};
    if (lane + i < lanes) all = join(all, right);
  }
  return all;
}

// A block joins the tiles of one image: stats of its rows, its share of every target's term.
template <typename A>
__global__ void __launch_bounds__(MERGE_THREADS, 2) merge_tiles(const __grid_constant__ Parameters p) {
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images, b = blockIdx.x;
  double* losses = reinterpret_cast<double*>(shared);  // [T, V]
  A* stats = static_cast<A*>(p.forward.stats);
  for (int i = threadIdx.x / WARP; i < T * V; i += MERGE_THREADS / WARP) {
    const int t = i / V, v = i % V;
    const Pair all = join_tiles(p, b, t, v);
    if (threadIdx.x % WARP) continue;
    const Teacher& teacher = d.teacher[t];
    losses[i] = d.pairs[i] == 0 ? 0
                                : d.pairs[i] * row_weight<A>(teacher, b) *
                                      cross_entropy(all.dot, all.teacher, all.student, teacher.probabilities);
    if (t == 0) {
      A* at = stats + student_stats(d.shape, v, b);
      at[0] = A(all.student.max / double(inverse_temperature<A>(d, -1)));  // of the logits again
      at[1] = A(log(all.student.sum));
    }
    if (v == 0) {
      A* at = stats + teacher_stats(d.shape, t, b);
      at[0] = A(all.teacher.max / double(inverse_temperature<A>(d, t)));
      at[1] = A(all.teacher.sum);
    }
  }
  __syncthreads();
  for (int target = threadIdx.x; target < d.targets; target += MERGE_THREADS) {
    double sum = 0;
    for (int i = 0; i < T * V; ++i)
      if (d.teacher[i / V].target == target) sum += losses[i];
    p.image_terms[target * B + b] = sum;
  }
}

// One block: terms and loss from every image's share.
template <typename A>
__global__ void __launch_bounds__(MERGE_THREADS, 2) total(const __grid_constant__ Parameters p) {
  const Call& d = p.call;
  const int64_t B = d.shape.images;
  double* sums = reinterpret_cast<double*>(shared);  // [warps]
  double loss = 0;
  for (int target = 0; target < d.targets; ++target) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < B; b += MERGE_THREADS) sum += p.image_terms[target * B + b];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double term = 0;
      for (int i = 0; i < MERGE_THREADS / WARP; ++i) term += sums[i];
      term = B ? term / double(B) : 0;  // no images: 0, not NaN
      static_cast<A*>(p.forward.terms)[target] = A(term);
      loss += weight<A>(d, target) * term;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *static_cast<A*>(p.forward.loss) = A(loss);
}

template <typename S>
__global__ void __launch_bounds__(THREADS, 4) backward_tiles(const __grid_constant__ Parameters p) {
  using A = Arithmetic<S>;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const A* stats = static_cast<const A*>(p.backward.stats);
  int64_t item;
  Tile at;
  if (!my_tile(p, at, item)) return;
  const int n = int(at.end - at.begin);
  const int64_t b = at.image, B = d.shape.images, K = d.shape.columns;
  Kept<A> q(shared, T, p.tile);
  Lane<A> x;
  for (int t = 0; t < T; ++t) {
    load_teacher(d.teacher[t], at, x);
    if (!d.teacher[t].probabilities) {
      const A* row = stats + teacher_stats(d.shape, t, b);
      const A max = row[0], normal = A(1) / row[1], rate = inverse_temperature<A>(d, t) * A(LOG2_E);
      each(x, n, [&](A& u, int) { u = power_of_two((u - max) * rate) * normal; });
    }
    q.put(t, x, n);
  }
  const A inverse = inverse_temperature<A>(d, -1), rate = inverse * A(LOG2_E);
  const A scale = *static_cast<const A*>(p.backward.grad_output) * inverse / A(B);
  Raw<S, A> next;
  fetch(d.student[0], at, next);
  for (int v = 0; v < V; ++v) {
    convert(next, n, x);
    if (v + 1 < V) fetch(d.student[v + 1], at, next);
    const A* row = stats + student_stats(d.shape, v, b);
    const A max = row[0], normal = A(mass(d, stats, v, b) * exp(-double(row[1]))) * scale;
    const bool any = has_pair(d, v);
    each(x, n, [&](A& g, int) { g = any ? power_of_two((g - max) * rate) * normal : A(0); });
    for (int t = 0; t < T; ++t) {
      const A c = A(coefficient<A>(d, t, v, b)) * scale;
      if (d.pairs[t * V + v] != 0) q.with(t, x, n, [&](int, A kept, A& g) { g -= c * kept; });
    }
    store(static_cast<S*>(p.backward.gradient) + (v * B + b) * K + at.begin, n, x);
  }
}

using Kernel = void (*)(Parameters);

// A kernel over the pieces of the call's columns, one for each type of the student.
void launch_tiles(Kernel f32, Kernel f64, Kernel bf16, Kernel f16, const Parameters& p, const Plan& plan,
                  void* stream) {
  const Shape& s = p.call.shape;
  const Type type = p.call.student[0].type;
  const int64_t items = s.images * tiles(s, p.tile);
  const size_t kept = size_t(plan.warps) * s.teachers * plan.tile * (type == F64 ? 8 : 4);
  const Kernel kernel = type == F32 ? f32 : type == F64 ? f64 : type == BF16 ? bf16 : f16;
  if (items) launch(kernel, (items + plan.warps - 1) / plan.warps, plan.warps * WARP, kept, stream, p);
}

template <typename A>
void launch_ends(const Parameters& p, void* stream) {
  const Shape& s = p.call.shape;
  if (s.images) launch(merge_tiles<A>, s.images, MERGE_THREADS, s.teachers * s.views * sizeof(double), stream, p);
  launch(total<A>, 1, MERGE_THREADS, MERGE_THREADS / WARP * sizeof(double), stream, p);
}

}  // namespace

Plan plan(const Shape& shape, Type student, int tile) {
  const int64_t bytes = student == F64 ? 8 : 4, most = CHUNK * (bytes == 8 ? CHUNKS<double> : CHUNKS<float>);
  // 48 KB a block need no attribute; TEACHERS rows of one fp64 chunk are just that.
  const int64_t warps = tile > 0 ? (48 << 10) / (shape.teachers * tile * bytes) : 0;
  if ((tile != CHUNK && tile != 2 * CHUNK && tile != 4 * CHUNK) || tile > most || warps < 1)
    throw std::invalid_argument("no CUDA kernel has tiles of " + std::to_string(tile) + " columns for " +
                                std::to_string(shape.teachers) + " teacher rows of this type");
  return {tile, int(warps < THREADS / WARP ? warps : THREADS / WARP)};
}
static_assert(TEACHERS * CHUNK * sizeof(double) <= 48 << 10, "no warp would fit");

void forward(const Call& call, double* states, const Plan& plan, Place place) {
  OnDevice device(place.device);
  launch_tiles(forward_tiles<float>, forward_tiles<double>, forward_tiles<__nv_bfloat16>, forward_tiles<__half>,
               {call, {}, {}, plan.tile, states, 0, nullptr}, plan, place.stream);
}

void finish(const Call& call, const Forward& io, double* states, int64_t tiles, double* image_terms,
            Place place) {
  OnDevice device(place.device);
  const Parameters p = {call, io, {}, 0, states, tiles, image_terms};
  if (call.student[0].type == F64) launch_ends<double>(p, place.stream);
  else launch_ends<float>(p, place.stream);
}

void backward(const Call& call, const Backward& io, const Plan& plan, Place place) {
  OnDevice device(place.device);
  launch_tiles(backward_tiles<float>, backward_tiles<double>, backward_tiles<__nv_bfloat16>,
               backward_tiles<__half>, {call, {}, io, plan.tile, nullptr, 0, nullptr}, plan, place.stream);
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

int built_version() { return CUDART_VERSION; }

}  // namespace mokd::cuda
