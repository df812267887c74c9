// A tile in the registers of a warp: 16-byte loads and stores, conversions, reductions.
//
// A lane holds STEP neighbouring columns of every chunk of CHUNK columns. Register arrays are indexed
// by unrolled loops alone; chunks past the tile's end are skipped, the same way by a whole warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "../core/distill.h"

namespace mokd::cuda {

constexpr int WARP = 32, STEP = 8, CHUNK = WARP * STEP;
template <typename A>
constexpr int CHUNKS = sizeof(A) == 8 ? 2 : 4;  // 32 columns a lane, 16 in fp64: registers

template <typename T>
struct alignas(16) Step {
  T at[STEP];
};

template <typename T, typename A>
struct Lane {
  Step<T> chunk[CHUNKS<A>];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// 2^x for x <= 0: 0 for -inf and below the smallest normal number, NaN for NaN, 2 ulp.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // not NaN
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// f(c, k) for every chunk c of a tile of n columns; the lane's first column there is k.
template <typename A, typename F>
__device__ __forceinline__ void each_chunk(int n, const F& f) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int c = 0; c < CHUNKS<A>; ++c)
    if (c * CHUNK < n) f(c, c * CHUNK + lane * STEP);
}

// f(x, k) for every element x and its column k.
template <typename A, typename F>
__device__ __forceinline__ void each(Lane<A, A>& x, int n, const F& f) {
  each_chunk<A>(n, [&](int c, int k) {
#pragma unroll
    for (int j = 0; j < STEP; ++j) f(x.chunk[c].at[j], k + j);
  });
}

template <typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A row's part of a tile in memory.
template <typename S>
struct Strip {
  const S* data;
  int64_t column;
  bool vectors;  // 16-byte loads are possible
  int n;

  __device__ __forceinline__ Strip(const Rows& rows, Tile at)
      : data(static_cast<const S*>(rows.data) + at.image * rows.image + at.begin * rows.column),
        column(rows.column), vectors(rows.column == 1 && aligned(data)), n(int(at.end - at.begin)) {}

  // Columns k to k + STEP; 0 past the tile's end.
  __device__ __forceinline__ Step<S> step(int k) const {
    if (vectors && k + STEP <= n) return *reinterpret_cast<const Step<S>*>(data + k);
    Step<S> raw;
#pragma unroll
    for (int j = 0; j < STEP; ++j) raw.at[j] = k + j < n ? data[(k + j) * column] : S(0.0f);
    return raw;
  }
};

template <typename S, typename A>
__device__ __forceinline__ void fetch(const Rows& rows, Tile at, Lane<S, A>& raw) {
  const Strip<S> strip(rows, at);
  each_chunk<A>(strip.n, [&](int c, int k) { raw.chunk[c] = strip.step(k); });
}

template <typename S, typename A>
__device__ __forceinline__ void convert(const Step<S>& raw, Step<A>& x) {
#pragma unroll
  for (int j = 0; j < STEP; ++j) x.at[j] = A(widen(raw.at[j]));
}

template <typename S, typename A>
__device__ __forceinline__ void convert(const Lane<S, A>& raw, int n, Lane<A, A>& x) {
  each_chunk<A>(n, [&](int c, int) { convert(raw.chunk[c], x.chunk[c]); });
}

template <typename S, typename A>
__device__ __forceinline__ void load_as(const Rows& rows, Tile at, Lane<A, A>& x) {
  const Strip<S> strip(rows, at);
  each_chunk<A>(strip.n, [&](int c, int k) { convert(strip.step(k), x.chunk[c]); });
}

template <typename A>
__device__ __forceinline__ void load(const Rows& rows, Tile at, Lane<A, A>& x) {
  if (rows.type == F32) load_as<float>(rows, at, x);
  else if (rows.type == F64) load_as<double>(rows, at, x);
  else if (rows.type == BF16) load_as<__nv_bfloat16>(rows, at, x);
  else load_as<__half>(rows, at, x);
}

template <typename S, typename A>
__device__ __forceinline__ void store(S* p, int n, const Lane<A, A>& x) {
  const bool vectors = aligned(p);
  each_chunk<A>(n, [&](int c, int k) {
    Step<S> out;
#pragma unroll
    for (int j = 0; j < STEP; ++j) narrow(x.chunk[c].at[j], out.at[j]);
    if (vectors && k + STEP <= n) {
      *reinterpret_cast<Step<S>*>(p + k) = out;
    } else {
#pragma unroll
      for (int j = 0; j < STEP; ++j)
        if (k + j < n) p[k + j] = out.at[j];
    }
  });
}

// Columns past the tile's end get `value`.
template <typename A>
__device__ __forceinline__ void pad(Lane<A, A>& x, int n, A value) {
  if (n % CHUNK) each(x, n, [&](A& e, int k) { e = k < n ? e : value; });
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int i = WARP / 2; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}

// Of the whole tile, NaN left out; finite for a tile of -inf alone.
template <typename A>
__device__ __forceinline__ A warp_max(Lane<A, A>& x, int n) {
  A top = sizeof(A) == 4 ? A(-FLT_MAX) : A(-DBL_MAX);
  each(x, n, [&](A& e, int) { top = larger(top, e); });
#pragma unroll
  for (int i = WARP / 2; i; i /= 2) top = larger(top, __shfl_xor_sync(0xffffffff, top, i));
  return top;
}

// Tiles that a lane keeps for itself in shared memory, one a teacher row: 16 bytes beside the 16 of
// its neighbours, so that no bank is hit twice.
template <typename A>
class Kept {
  static constexpr int WIDTH = 16 / sizeof(A), VECTORS = STEP / WIDTH;
  struct alignas(16) Vector {
    A at[WIDTH];
  };
  Vector* base_;
  int chunks_;

 public:
  __device__ Kept(void* shared, int rows, int tile) : chunks_(tile / CHUNK) {
    base_ = static_cast<Vector*>(shared) + (threadIdx.x / WARP) * rows * (tile / WIDTH) + threadIdx.x % WARP;
  }
  __device__ __forceinline__ void put(int row, const Lane<A, A>& x, int n) {
    each_chunk<A>(n, [&](int c, int) {
#pragma unroll
      for (int h = 0; h < VECTORS; ++h) {
        Vector v;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v.at[i] = x.chunk[c].at[h * WIDTH + i];
        base_[((row * chunks_ + c) * VECTORS + h) * WARP] = v;
      }
    });
  }
  // f(kept, e) for every element e of x and the one of `row` that was kept for its column.
  template <typename F>
  __device__ __forceinline__ void with(int row, Lane<A, A>& x, int n, const F& f) const {
    each_chunk<A>(n, [&](int c, int) {
#pragma unroll
      for (int h = 0; h < VECTORS; ++h) {
        const Vector v = base_[((row * chunks_ + c) * VECTORS + h) * WARP];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) f(v.at[i], x.chunk[c].at[h * WIDTH + i]);
      }
    });
  }
};

}  // namespace mokd::cuda
