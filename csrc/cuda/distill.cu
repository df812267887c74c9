// distill_cross_entropy on CUDA. Formula and merges: csrc/core/distill.h, which the CPU runs too.
//
// A warp works on one piece: a tile of columns of one image. It reads the T teacher tiles once, keeps
// their exponentials in shared memory, each lane its own columns (so there is no barrier), and walks
// over the V student tiles, the next one already on its way.
//   forward   reads (T + V) B K, writes what a piece says of its rows and pairs; once all columns were
//             read, `merge_tiles` joins them, and its last block sums the images. Nothing waits for a
//             lock, and no sum is made in the order in which blocks end: the same bits.
//   backward  reads (T + V) B K, writes V B K; from the last piece to the first, since what forward
//             read last is still in the L2.
// Each comes twice: `_whole` for tiles that are whole in rows that allow 16 bytes at a time and are of
// one 16 or 32 bit type (whole.h), `_tiles` for all others, ragged ends among them (tile.h).
// Maxima are those of the logits, before the temperature: s - max is exact where s * 1/tau is not.
#include "distill.h"

#ifdef __CUDACC__
#include "launch.h"
#else
#include "emulator.h"  // tests/ops: the same kernels on a host, for machines without a GPU
#endif
#include "tile.h"
#include "whole.h"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace mokd::cuda {

extern __shared__ uint4 shared[];

namespace {

// Threads of a block: of pieces (at most), and of the kernels after them. The blocks a multiprocessor
// that __launch_bounds__ asks for are the most that compile without spills for every architecture.
constexpr int THREADS = 128, MERGE_THREADS = 640;
constexpr int64_t SHARED = 48 << 10;  // bytes that a block has without an attribute
constexpr double LOG2_E = 1.4426950408889634;
// Of the kernels for whole tiles, by the columns of a lane.
template <typename S, int E>
constexpr int FORWARD_BLOCKS = E == 32 ? 4 : E == 16 ? (sizeof(S) == 2 ? 8 : 7) : 10;
template <typename S, int E>
constexpr int BACKWARD_BLOCKS = E == 32 ? 4 : E == 16 && sizeof(S) == 4 ? 7 : 8;
// Of backward_tiles: fp32 on sm_80 would spill with four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename S>
constexpr int TILES_BLOCKS = std::is_same_v<S, float> ? 3 : 4;
#else
template <typename S>
constexpr int TILES_BLOCKS = 4;
#endif

struct Parameters {
  Call call;
  Forward forward;
  Backward backward;
  unsigned paired[TEACHERS];  // bit v: the row has a pair with view v
  int tile;
  int64_t first, count;  // tiles of an image: where this launch begins, how many it has
  void* states;          // [B, state_size, tiles] of the arithmetic's type, see `Written`
  int64_t all;           // tiles of an image there
  double* image_terms;   // [targets, B]
  unsigned* joined;      // how many images `merge_tiles` has joined; forward sets it to 0
};
static_assert(sizeof(Parameters) <= 4096, "more than a kernel takes");
static_assert(VIEWS <= 32, "more than bits of `paired`");

template <typename S>
using Arithmetic = std::conditional_t<sizeof(S) == 8, double, float>;

// This block in backward.
__device__ __forceinline__ unsigned from_the_end() { return gridDim.x - 1 - blockIdx.x; }

// The piece of this warp of a block; false past the last one.
__device__ __forceinline__ bool my_piece(const Parameters& p, unsigned block, int64_t& image, int64_t& tile) {
  const int64_t item = int64_t(block) * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (item >= p.call.shape.images * p.count) return false;
  const unsigned count = unsigned(p.count);  // a grid has fewer than 2^31 blocks, of 4 pieces
  image = item <= 0xffffffffu ? unsigned(item) / count : item / p.count;
  tile = p.first + (item - image * p.count);
  return true;
}

// What a piece says: maximum and sum of each teacher row and each student row, in units of the logits,
// and the dots of pairs. A number of all tiles of an image lies in a row, for `merge_tiles`.
template <typename A>
struct Written {
  A* at;
  int64_t step;
  int T, V;

  __device__ __forceinline__ Written(const Parameters& p, int64_t image, int64_t tile)
      : at(static_cast<A*>(p.states) + image * state_size(p.call.shape) * p.all + tile), step(p.all),
        T(p.call.shape.teachers), V(p.call.shape.views) {}
  __device__ __forceinline__ A& teacher(int t, int i) const { return at[(2 * t + i) * step]; }
  __device__ __forceinline__ A& student(int v, int i) const { return at[(2 * (T + v) + i) * step]; }
  __device__ __forceinline__ A& dot(int t, int v) const { return at[(2 * (T + V) + t * V + v) * step]; }
};

__device__ __forceinline__ Rows view_of(const Call& d, int v) {
  Rows rows = d.student;
  rows.data = static_cast<const char*>(rows.data) + v * d.view * item_size(rows.type);
  return rows;
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
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.joined = 0;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const A infinity = A(INFINITY);
  int64_t image, tile;
  if (!my_piece(p, blockIdx.x, image, tile)) return;
  const Tile at = tile_at(d.shape, p.tile, image * tiles(d.shape, p.tile) + tile);
  const int n = int(at.end - at.begin);
  const bool first = threadIdx.x % WARP == 0;
  const Written<A> out(p, image, tile);
  Kept<A> e(shared, T, p.tile);
  Lane<A> x;
  for (int t = 0; t < T; ++t) {
    const bool given = d.teacher[t].probabilities;
    load_teacher(d.teacher[t], at, x);
    pad(x, n, given ? A(0) : -infinity);
    const A rate = inverse_temperature<A>(d, t) * A(LOG2_E), top = given ? A(0) : max_of(x, n);
    const A sum = sum_of(x, n, [&](A& u) { return u = given ? u : power_of_two((u - top) * rate); });
    e.put(t, x, n);
    if (first) out.teacher(t, 0) = top, out.teacher(t, 1) = sum;
  }
  const A rate = inverse_temperature<A>(d, -1) * A(LOG2_E);
  Raw<S, A> next;
  fetch(view_of(d, 0), at, next);
  for (int v = 0; v < V; ++v) {
    convert(next, n, x);
    if (v + 1 < V) fetch(view_of(d, v + 1), at, next);
    pad(x, n, -infinity);
    const A top = max_of(x, n);
    const A sum = sum_of(x, n, [&](A& z) { return power_of_two((z -= top) * rate); });
    if (first) out.student(v, 0) = top, out.student(v, 1) = sum;
    pad(x, n, A(0));  // -inf times the teacher's 0 would be NaN
    for (int t = 0; t < T; ++t) {
      const A sum = d.pairs[t * V + v] == 0 ? A(0) : dot(e, t, x, n);
      if (first) out.dot(t, v) = sum;
    }
  }
}

// Where a warp of a kernel for whole tiles is. All warps of a block have the same image; a warp past
// the last tile has nothing to do.
struct Piece {
  int64_t image, tile, k;  // k: the lane's first column
  int warp, lane;
  bool any;

  __device__ __forceinline__ Piece(const Parameters& p, unsigned block, int width)
      : warp(threadIdx.x / WARP), lane(threadIdx.x % WARP) {
    const unsigned warps = blockDim.x / WARP, blocks = (unsigned(p.count) + warps - 1) / warps;  // of an image
    image = block / blocks;
    tile = int64_t(block % blocks) * warps + warp;
    any = tile < p.count;
    k = tile * p.tile + lane * width;
  }
};

template <typename S>
__device__ __forceinline__ const S* row_at(const Rows& rows, const Piece& at) {
  return static_cast<const S*>(rows.data) + (at.image * rows.image + at.k);
}

template <typename S, int N>
__device__ __forceinline__ void subtract_center(const Teacher& teacher, int64_t k, float (&x)[N * WIDTH<S>]) {
  if (!teacher.center) return;
  const float* center = static_cast<const float*>(teacher.center) + k;  // the same for every image
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < WIDTH<S>; j += 4) {
      const float4 c = *reinterpret_cast<const float4*>(center + i * WARP * WIDTH<S> + j);
      float* at = x + i * WIDTH<S> + j;
      at[0] -= c.x, at[1] -= c.y, at[2] -= c.z, at[3] -= c.w;
    }
}

// As forward_tiles. Rows are one stream, teachers first: the next one is on its way while one is used.
template <typename S, int N>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS<S, N * WIDTH<S>>)
    forward_whole(const __grid_constant__ Parameters p) {
  constexpr int E = N * WIDTH<S>;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.joined = 0;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const Piece at(p, blockIdx.x, WIDTH<S>);
  if (!at.any) return;
  const Written<float> out(p, at.image, at.tile);
  Shelf<E> e(shared, T, at.warp, at.lane);
  Words<S, N> next;
  float x[E];
  next.load(row_at<S>(d.teacher[0].rows, at));
  for (int t = 0; t < T; ++t) {
    const Teacher& teacher = d.teacher[t];
    next.wide(x);
    next.load(row_at<S>(t + 1 < T ? d.teacher[t + 1].rows : d.student, at));
    subtract_center<S, N>(teacher, at.k, x);
    const float rate = inverse_temperature<float>(d, t) * float(LOG2_E);
    const float top = teacher.probabilities ? 0 : warp_max(x);
    if (!teacher.probabilities)
#pragma unroll
      for (int j = 0; j < E; ++j) x[j] = power_of_two((x[j] - top) * rate);
    e.put(t, x);
    const float sum = warp_sum(lane_sum<E>([&](int j) { return x[j]; }));
    if (at.lane < 2) out.teacher(t, at.lane) = at.lane ? sum : top;
  }
  const float rate = inverse_temperature<float>(d, -1) * float(LOG2_E);
  const S* student = row_at<S>(d.student, at);
  // Of a view lane 1 writes the maximum, lane 0 the sum, lane 8 i the dot with teacher row i - 1.
  const int mine = at.lane / 8 - 1;
  const bool writes = at.lane < 2 || (at.lane % 8 == 0 && mine < T);
  float* place = mine < 0 ? &out.student(0, at.lane ? 0 : 1) : &out.dot(mine, 0);
  const int64_t step = (mine < 0 ? 2 : 1) * out.step;
  for (int v = 0; v < V; ++v, place += step) {
    const float largest = next.largest();
    next.wide(x);
    if (v + 1 < V) next.load(student += d.view);
    const float top = warp_max(largest);
    float sums[4] = {lane_sum<E>([&](int j) { return power_of_two((x[j] -= top) * rate); })};
#pragma unroll
    for (int t = 0; t < 3; ++t)
      if (t < T && p.paired[t] >> v & 1) sums[t + 1] = e.dot(t, x);
    const float sum = warp_sums(sums, at.lane);
    if (writes) *place = at.lane == 1 ? top : sum;
    for (int first = 3; first < T; first += 4) {
      float more[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < T && p.paired[first + i] >> v & 1) more[i] = e.dot(first + i, x);
      const float sum = warp_sums(more, at.lane);
      const int t = first + at.lane / 8;
      if (at.lane % 8 == 0 && t < T) out.dot(t, v) = sum;
    }
  }
}

// A pair of rows over all columns.
struct Pair {
  Partial teacher, student;
  double dot;
};

// A warp joins all tiles of a pair of image b, whose maxima are `high` and `top` in units of the logits.
template <typename A>
__device__ __forceinline__ Pair join_tiles(const Parameters& p, int64_t b, int t, int v, A& high, A& top) {
  const Written<A> first(p, b, 0);
  const int lane = threadIdx.x % WARP;
  const double of_t = double(inverse_temperature<A>(p.call, t)), of_s = double(inverse_temperature<A>(p.call, -1));
  high = top = -A(INFINITY);
#pragma unroll 4  // loads that wait together
  for (int64_t i = lane; i < p.all; i += WARP) {
    high = larger(high, (&first.teacher(t, 0))[i]);
    top = larger(top, (&first.student(v, 0))[i]);
  }
  high = warp_largest(high), top = warp_largest(top);
  Pair all = {{double(high) * of_t, 0}, {double(top) * of_s, 0}, 0};
#pragma unroll 2
  for (int64_t i = lane; i < p.all; i += WARP) {
    const double teacher_max = (&first.teacher(t, 0))[i], teacher_sum = (&first.teacher(t, 1))[i];
    const double student_max = (&first.student(v, 0))[i], student_sum = (&first.student(v, 1))[i];
    const double dot = (&first.dot(t, v))[i];
    // In units of the logits: of a difference of two products the compiler rounds one alone, and where
    // both are the same number what is left is its last digit, which may be any size in fp64.
    const double below = (student_max - top) * of_s, share = decay<A>((teacher_max - high) * of_t);
    all.teacher.sum += share * teacher_sum;
    all.student.sum += decay<A>(below) * student_sum;
    all.dot += share * (dot * of_s + teacher_sum * below);
  }
  all.teacher.sum = warp_sum(all.teacher.sum);
  all.student.sum = warp_sum(all.student.sum);
  all.dot = warp_sum(all.dot);
  return all;
}

// By one block: terms and loss from every image's share.
template <typename A>
__device__ void total(const Parameters& p, double* sums) {
  const Call& d = p.call;
  const int64_t B = d.shape.images;
  double loss = 0;
  for (int target = 0; target < d.targets; ++target) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < B; b += blockDim.x) sum += __ldcg(p.image_terms + target * B + b);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double term = 0;
      for (int i = 0; i < blockDim.x / WARP; ++i) term += sums[i];
      term = B ? term / double(B) : 0;  // no images: 0, not NaN
      static_cast<A*>(p.forward.terms)[target] = A(term);
      loss += weight<A>(d, target) * term;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *static_cast<A*>(p.forward.loss) = A(loss);
}

// A block joins the tiles of one image, a warp a pair: stats of its rows, its share of every target's
// term. The block that is the last to do so sums the shares, in the order of the images.
template <typename A>
__global__ void __launch_bounds__(MERGE_THREADS) merge_tiles(const __grid_constant__ Parameters p) {
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const int64_t B = d.shape.images, b = blockIdx.x;
  double* losses = reinterpret_cast<double*>(shared);  // [T, V]
  A* stats = static_cast<A*>(p.forward.stats);
  for (int i = threadIdx.x / WARP; i < T * V; i += blockDim.x / WARP) {
    const int t = i / V, v = i % V;
    A high, top;
    const Pair all = join_tiles<A>(p, b, t, v, high, top);
    if (threadIdx.x % WARP) continue;
    const Teacher& teacher = d.teacher[t];
    losses[i] = d.pairs[i] == 0 ? 0
                                : d.pairs[i] * row_weight<A>(teacher, b) *
                                      cross_entropy(all.dot, all.teacher, all.student, teacher.probabilities);
    if (t == 0) {
      A* at = stats + student_stats(d.shape, v, b);
      at[0] = top;
      at[1] = A(log(all.student.sum));
    }
    if (v == 0) {
      A* at = stats + teacher_stats(d.shape, t, b);
      at[0] = high;
      at[1] = A(all.teacher.sum);
    }
  }
  __syncthreads();
  for (int target = threadIdx.x; target < d.targets; target += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < T * V; ++i)
      if (d.teacher[i / V].target == target) sum += losses[i];
    p.image_terms[target * B + b] = sum;
  }
  __threadfence();  // before the others may count this image
  __syncthreads();
  double* last = losses + T * V;
  if (threadIdx.x == 0) *last = atomicAdd(p.joined, 1u) == B - 1;
  __syncthreads();
  if (*last) total<A>(p, losses);
}

template <typename A>
__global__ void of_no_images(const __grid_constant__ Parameters p) {
  total<A>(p, reinterpret_cast<double*>(shared));
}

template <typename S>
__global__ void __launch_bounds__(THREADS, TILES_BLOCKS<S>) backward_tiles(const __grid_constant__ Parameters p) {
  using A = Arithmetic<S>;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const A* stats = static_cast<const A*>(p.backward.stats);
  int64_t b, tile;
  if (!my_piece(p, from_the_end(), b, tile)) return;
  const Tile at = tile_at(d.shape, p.tile, b * tiles(d.shape, p.tile) + tile);
  const int n = int(at.end - at.begin);
  const int64_t B = d.shape.images, K = d.shape.columns;
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
  fetch(view_of(d, 0), at, next);
  for (int v = 0; v < V; ++v) {
    convert(next, n, x);
    if (v + 1 < V) fetch(view_of(d, v + 1), at, next);
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

// What backward needs to know of a view: c softmax(z) is normal 2^((s - max) rate).
struct View {
  float max, normal;
};

// As backward_tiles.
template <typename S, int N>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS<S, N * WIDTH<S>>)
    backward_whole(const __grid_constant__ Parameters p) {
  constexpr int E = N * WIDTH<S>;
  const Call& d = p.call;
  const int T = d.shape.teachers, V = d.shape.views;
  const float* stats = static_cast<const float*>(p.backward.stats);
  const Piece at(p, from_the_end(), WIDTH<S>);
  const int64_t B = d.shape.images, K = d.shape.columns;
  Shelf<E> q(shared, T, at.warp, at.lane);
  Words<S, N> next;
  float x[E];
  if (at.any) next.load(row_at<S>(d.teacher[0].rows, at));
  // Behind the rows, for all warps: the views, and the coefficient of each pair.
  View* views = reinterpret_cast<View*>(reinterpret_cast<float*>(shared) + int(blockDim.x) * T * E);
  float* coefficients = reinterpret_cast<float*>(views + V);
  const float scale = *static_cast<const float*>(p.backward.grad_output) * inverse_temperature<float>(d, -1) / float(B);
  for (int i = threadIdx.x; i < T * V; i += blockDim.x)
    coefficients[i] = float(coefficient<float>(d, i / V, i % V, at.image)) * scale;
  for (int v = threadIdx.x; v < V; v += blockDim.x) {
    const float* row = stats + student_stats(d.shape, v, at.image);
    views[v] = {row[0], float(mass(d, stats, v, at.image) * exp(-double(row[1]))) * scale};
  }
  __syncthreads();
  if (!at.any) return;
  unsigned any = 0;
  for (int t = 0; t < T; ++t) {
    const Teacher& teacher = d.teacher[t];
    any |= p.paired[t];
    next.wide(x);
    next.load(row_at<S>(t + 1 < T ? d.teacher[t + 1].rows : d.student, at));
    subtract_center<S, N>(teacher, at.k, x);
    if (!teacher.probabilities) {
      const float* row = stats + teacher_stats(d.shape, t, at.image);
      const float max = row[0], normal = 1 / row[1], rate = inverse_temperature<float>(d, t) * float(LOG2_E);
#pragma unroll
      for (int j = 0; j < E; ++j) x[j] = power_of_two((x[j] - max) * rate) * normal;
    }
    q.put(t, x);
  }
  const float rate = inverse_temperature<float>(d, -1) * float(LOG2_E);
  const S* student = row_at<S>(d.student, at);
  S* out = static_cast<S*>(p.backward.gradient) + (at.image * K + at.k);
  const int64_t step = B * K;
  for (int v = 0; v < V; ++v, out += step) {
    const View view = views[v];
    next.wide(x);
    if (v + 1 < V) next.load(student += d.view);
    if (any >> v & 1)
#pragma unroll
      for (int j = 0; j < E; ++j) x[j] = power_of_two((x[j] - view.max) * rate) * view.normal;
    else
#pragma unroll
      for (int j = 0; j < E; ++j) x[j] = 0;
    for (int t = 0; t < T; ++t) {
      if (!(p.paired[t] >> v & 1)) continue;
      const float c = coefficients[t * V + v];
      q.each(t, [&](float kept, int j) { x[j] -= c * kept; });
    }
    store_whole<S, N>(out, x);
  }
}

using Kernel = void (*)(Parameters);

// One of each, by the student's type.
struct Kernels {
  Kernel f32, f64, bf16, f16;
  Kernel of(Type type) const { return type == F32 ? f32 : type == F64 ? f64 : type == BF16 ? bf16 : f16; }
};

template <int COLUMNS>
constexpr Kernels FORWARD_WHOLE = {forward_whole<float, COLUMNS / 128>, nullptr,
                                   forward_whole<__nv_bfloat16, COLUMNS / 256>, forward_whole<__half, COLUMNS / 256>};
template <int COLUMNS>
constexpr Kernels BACKWARD_WHOLE = {backward_whole<float, COLUMNS / 128>, nullptr,
                                    backward_whole<__nv_bfloat16, COLUMNS / 256>, backward_whole<__half, COLUMNS / 256>};

bool aligned_rows(const Rows& rows, Type type, int64_t images) {
  return rows.type == type && rows.column == 1 && uintptr_t(rows.data) % 16 == 0 &&
         (images == 1 || rows.image * item_size(type) % 16 == 0);
}

// Whether tiles that are whole can be read, and gradients written, 16 bytes at a time.
bool aligned_call(const Call& d, const void* gradient) {
  const Type type = d.student.type;
  const int64_t B = d.shape.images;
  if (type == F64 || uintptr_t(gradient) % 16) return false;
  if (gradient && B * d.shape.views > 1 && d.shape.columns * item_size(type) % 16) return false;
  if (!aligned_rows(d.student, type, B) || (d.shape.views > 1 && d.view * item_size(type) % 16)) return false;
  for (int t = 0; t < d.shape.teachers; ++t)
    if (!aligned_rows(d.teacher[t].rows, type, B) || uintptr_t(d.teacher[t].center) % 16) return false;
  return true;
}

// Kernels over the pieces of the call's columns: the whole tiles where that can be, then the others.
// `beside`: fp32 numbers that a block of the first keeps beside its teacher rows.
void launch_tiles(const Kernels& whole, const Kernels& any, Parameters p, const Plan& plan, size_t beside, void* stream) {
  const Shape& s = p.call.shape;
  const Type type = p.call.student.type;
  const int64_t all = tiles(s, plan.tile), warps = plan.warps;
  const size_t rows = size_t(s.teachers) * plan.tile * (type == F64 ? 8 : 4), more = beside * sizeof(float);
  for (int t = 0; t < s.teachers; ++t)
    for (int v = 0; v < s.views; ++v) p.paired[t] |= unsigned(p.call.pairs[t * s.views + v] != 0) << v;
  // A warp fewer where all would leave no room beside their rows, as for 4, 8 or 12 of these.
  const int64_t fit = warps * rows + more <= SHARED ? warps : warps - 1;
  p.count = fit && aligned_call(p.call, p.backward.gradient) ? s.columns / plan.tile : 0;
  if (p.count && s.images)
    launch(whole.of(type), s.images * ((p.count + fit - 1) / fit), fit * WARP, fit * rows + more, stream, p);
  p.first = p.count, p.count = all - p.first;
  if (const int64_t pieces = s.images * p.count)
    launch(any.of(type), (pieces + warps - 1) / warps, warps * WARP, warps * rows, stream, p);
}

template <typename A>
void launch_end(const Parameters& p, void* stream) {
  const Shape& s = p.call.shape;
  const int pairs = s.teachers * s.views, warps = pairs < MERGE_THREADS / WARP ? pairs : MERGE_THREADS / WARP;
  const size_t bytes = (pairs + 1) * sizeof(double);  // a sum of each warp fits, too
  if (s.images) launch(merge_tiles<A>, s.images, warps * WARP, bytes, stream, p);
  else launch(of_no_images<A>, 1, WARP, bytes, stream, p);
}

const Kernels& by_tile(int tile, const Kernels& of_256, const Kernels& of_512, const Kernels& of_1024) {
  return tile == 256 ? of_256 : tile == 512 ? of_512 : of_1024;
}

}  // namespace

Plan plan(const Shape& shape, Type student, int tile) {
  const int64_t bytes = student == F64 ? 8 : 4, most = CHUNK * (bytes == 8 ? CHUNKS<double> : CHUNKS<float>);
  // TEACHERS rows of one fp64 chunk are just that.
  const int64_t warps = tile > 0 ? SHARED / (shape.teachers * tile * bytes) : 0;
  if ((tile != CHUNK && tile != 2 * CHUNK && tile != 4 * CHUNK) || tile > most || warps < 1)
    throw std::invalid_argument("no CUDA kernel has tiles of " + std::to_string(tile) + " columns for " +
                                std::to_string(shape.teachers) + " teacher rows of this type");
  return {tile, int(warps < THREADS / WARP ? warps : THREADS / WARP)};
}
static_assert(TEACHERS * CHUNK * sizeof(double) <= SHARED, "no warp would fit");

void forward(const Call& call, void* states, unsigned* joined, const Plan& plan, Place place) {
  OnDevice device(place.device);
  const Kernels any = {forward_tiles<float>, forward_tiles<double>, forward_tiles<__nv_bfloat16>, forward_tiles<__half>};
  launch_tiles(by_tile(plan.tile, FORWARD_WHOLE<256>, FORWARD_WHOLE<512>, FORWARD_WHOLE<1024>), any,
               {call, {}, {}, {}, plan.tile, 0, 0, states, tiles(call.shape, plan.tile), nullptr, joined}, plan, 0, place.stream);
}

void finish(const Call& call, const Forward& io, void* states, int64_t tiles, double* image_terms,
            unsigned* joined, Place place) {
  OnDevice device(place.device);
  const Parameters p = {call, io, {}, {}, 0, 0, 0, states, tiles, image_terms, joined};
  if (call.student.type == F64) launch_end<double>(p, place.stream);
  else launch_end<float>(p, place.stream);
}

void backward(const Call& call, const Backward& io, const Plan& plan, Place place) {
  OnDevice device(place.device);
  const Kernels any = {backward_tiles<float>, backward_tiles<double>, backward_tiles<__nv_bfloat16>, backward_tiles<__half>};
  launch_tiles(by_tile(plan.tile, BACKWARD_WHOLE<256>, BACKWARD_WHOLE<512>, BACKWARD_WHOLE<1024>), any,
               {call, {}, io, {}, plan.tile, 0, 0, nullptr, 0, nullptr, nullptr}, plan, call.shape.views * (2 + call.shape.teachers), place.stream);
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

int built_version() { return CUDART_VERSION; }

}  // namespace mokd::cuda
