// A tile in the registers of a warp: 16-byte loads and stores, conversions, reductions.
//
// A lane holds STEP neighbouring columns of every chunk of CHUNK columns. Register arrays are indexed
// by unrolled loops alone; chunks past the tile's end are skipped, the same way by a whole warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstring>

#include "../core/distill.h"

namespace mokd::cuda {

constexpr int WARP = 32, STEP = 8, CHUNK = WARP * STEP;
template <typename A>
constexpr int CHUNKS = sizeof(A) == 8 ? 2 : 4;  // 32 columns a lane, 16 in fp64: registers

template <typename A>
struct Lane {
  A at[CHUNKS<A>][STEP];
};

// The same columns as they came from memory. Whole words: to split them would wait for the load.
template <typename S, typename A>
struct Raw {
  uint4 at[CHUNKS<A>][STEP * sizeof(S) / sizeof(uint4)];
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
__device__ __forceinline__ void each(Lane<A>& x, int n, const F& f) {
  each_chunk<A>(n, [&](int c, int k) {
#pragma unroll
    for (int j = 0; j < STEP; ++j) f(x.at[c][j], k + j);
  });
}

template <typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A row's part of a tile in memory.
template <typename S>
struct Strip {
  static constexpr int WORDS = STEP * sizeof(S) / sizeof(uint4);
  const S* data;
  int64_t column;
  bool vectors;
  int n;

  __device__ __forceinline__ Strip(const Rows& rows, Tile at)
      : data(static_cast<const S*>(rows.data) + at.image * rows.image + at.begin * rows.column),
        column(rows.column), vectors(column == 1 && aligned(data)), n(int(at.end - at.begin)) {}

  // The lane's columns of chunk c, from k. Chunks that are full are read 16 bytes at a time where the
  // row allows it, the others by element, 0 past the tile's end.
  __device__ __forceinline__ void fetch(int c, int k, uint4* words) const {
    if (vectors && (c + 1) * CHUNK <= n) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) words[w] = reinterpret_cast<const uint4*>(data + k)[w];
    } else {
      S one[STEP];
#pragma unroll
      for (int j = 0; j < STEP; ++j) one[j] = k + j < n ? data[(k + j) * column] : S(0.0f);
      memcpy(words, one, sizeof(one));
    }
  }
};

template <typename S, typename A>
__device__ __forceinline__ void convert(const uint4* words, A* x) {
  S one[STEP];
  memcpy(one, words, sizeof(one));
#pragma unroll
  for (int j = 0; j < STEP; ++j) x[j] = A(widen(one[j]));
}

// All loads at once, to be converted later.
template <typename S, typename A>
__device__ __forceinline__ void fetch(const Rows& rows, Tile at, Raw<S, A>& raw) {
  const Strip<S> strip(rows, at);
  each_chunk<A>(strip.n, [&](int c, int k) { strip.fetch(c, k, raw.at[c]); });
}

template <typename S, typename A>
__device__ __forceinline__ void convert(const Raw<S, A>& raw, int n, Lane<A>& x) {
  each_chunk<A>(n, [&](int c, int) { convert<S>(raw.at[c], x.at[c]); });
}

// A chunk after the other: all of fp64 at once would not fit beside fp32 arithmetic.
template <typename S, typename A>
__device__ __forceinline__ void load_as(const Rows& rows, Tile at, Lane<A>& x) {
  const Strip<S> strip(rows, at);
  each_chunk<A>(strip.n, [&](int c, int k) {
    uint4 words[Strip<S>::WORDS];
    strip.fetch(c, k, words);
    convert<S>(words, x.at[c]);
  });
}

template <typename A>
__device__ __forceinline__ void load(const Rows& rows, Tile at, Lane<A>& x) {
  if (rows.type == F32) load_as<float>(rows, at, x);
  else if (rows.type == F64) load_as<double>(rows, at, x);
  else if (rows.type == BF16) load_as<__nv_bfloat16>(rows, at, x);
  else load_as<__half>(rows, at, x);
}

// As one store: nvcc may find an assignment's numbers stored one by one nearby, and join the two so.
__device__ __forceinline__ void write(void* p, uint4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(p) = x;
#endif
}

template <typename S, typename A>
__device__ __forceinline__ void store(S* p, int n, const Lane<A>& x) {
  const bool vectors = aligned(p);
  each_chunk<A>(n, [&](int c, int k) {
    S one[STEP];
#pragma unroll
    for (int j = 0; j < STEP; ++j) narrow(x.at[c][j], one[j]);
    if (vectors && (c + 1) * CHUNK <= n) {
      constexpr int WORDS = Strip<S>::WORDS;
      uint4 words[WORDS];
      memcpy(words, one, sizeof(one));
#pragma unroll
      for (int w = 0; w < WORDS; ++w) write(reinterpret_cast<uint4*>(p + k) + w, words[w]);
    } else {
#pragma unroll
      for (int j = 0; j < STEP; ++j)
        if (k + j < n) p[k + j] = one[j];
    }
  });
}

// Columns past the tile's end get `value`.
template <typename A>
__device__ __forceinline__ void pad(Lane<A>& x, int n, A value) {
  if (n % CHUNK) each(x, n, [&](A& e, int k) { e = k < n ? e : value; });
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int i = WARP / 2; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}

template <typename A>
__device__ __forceinline__ A warp_largest(A x) {  // NaN left out
#pragma unroll
  for (int i = WARP / 2; i; i /= 2) x = larger(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}

// `start` joined with f(e) for every element e of a lane: pairwise in a step, so that chains are short.
template <typename A, typename F, typename Join>
__device__ __forceinline__ A fold(Lane<A>& x, int n, A start, const F& f, const Join& join) {
  each_chunk<A>(n, [&](int c, int) {
    A e[STEP];
#pragma unroll
    for (int j = 0; j < STEP; ++j) e[j] = f(x.at[c][j]);
#pragma unroll
    for (int w = STEP / 2; w; w /= 2)
#pragma unroll
      for (int j = 0; j < w; ++j) e[j] = join(e[j], e[j + w]);
    start = join(start, e[0]);
  });
  return start;
}

template <typename A, typename F>
__device__ __forceinline__ A sum_of(Lane<A>& x, int n, const F& f) {
  return warp_sum(fold(x, n, A(0), f, [](A a, A b) { return a + b; }));
}

// NaN left out; finite for a tile of -inf alone.
template <typename A>
__device__ __forceinline__ A max_of(Lane<A>& x, int n) {
  const A lowest = sizeof(A) == 4 ? A(-FLT_MAX) : A(-DBL_MAX);
  return warp_largest(fold(x, n, lowest, [](A e) { return e; }, [](A a, A b) { return larger(a, b); }));
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

  __device__ __forceinline__ Vector& at(int row, int c, int h) const {
    return base_[((row * chunks_ + c) * VECTORS + h) * WARP];
  }

 public:
  __device__ Kept(void* shared, int rows, int tile) : chunks_(tile / CHUNK) {
    base_ = static_cast<Vector*>(shared) + (threadIdx.x / WARP) * rows * (tile / WIDTH) + threadIdx.x % WARP;
  }
  __device__ __forceinline__ void put(int row, const Lane<A>& x, int n) {
    each_chunk<A>(n, [&](int c, int) {
#pragma unroll
      for (int h = 0; h < VECTORS; ++h) {
        Vector v;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v.at[i] = x.at[c][h * WIDTH + i];
        at(row, c, h) = v;
      }
    });
  }
  // f(j, kept, e) for every element e of x, the j-th of its step, and the one kept of its column.
  template <typename F>
  __device__ __forceinline__ void with(int row, Lane<A>& x, int n, const F& f) const {
    each_chunk<A>(n, [&](int c, int) {
#pragma unroll
      for (int h = 0; h < VECTORS; ++h) {
        const Vector v = at(row, c, h);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) f(h * WIDTH + i, v.at[i], x.at[c][h * WIDTH + i]);
      }
    });
  }
};

// sum of kept times x over a tile, in chains of their own
template <typename A>
__device__ __forceinline__ A dot(const Kept<A>& kept, int row, Lane<A>& x, int n) {
  A part[4] = {};
  kept.with(row, x, n, [&](int j, A e, A z) { part[j % 4] += e * z; });
  return warp_sum((part[0] + part[1]) + (part[2] + part[3]));
}

}  // namespace mokd::cuda
