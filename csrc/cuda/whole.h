// A tile that is whole in rows of one type, 16 bytes at a time: what almost all columns of almost all
// calls are. Nothing is asked of a column here: no bounds, no strides, no other types (tile.h has those).
//
// A lane holds WIDTH neighbouring columns of every 32 WIDTH, in N words of 16 bytes: 32 N WIDTH columns
// a tile. E = N WIDTH of them are a lane's own.
#pragma once
#include "tile.h"

#include <climits>

namespace mokd::cuda {

template <typename S>
constexpr int WIDTH = sizeof(uint4) / sizeof(S);

// Of a stream that nobody reads again soon.
__device__ __forceinline__ uint4 read(const void* p) {
#ifdef __CUDA_ARCH__
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
#else
  return *static_cast<const uint4*>(p);
#endif
}

// 32 bits of a row: PER numbers of its type. `largest` is number by number and leaves NaN out.
template <typename S>
struct Word;

template <typename S>
__device__ __forceinline__ unsigned largest_as_float(unsigned a, unsigned b) {
  constexpr int PER = WIDTH<S> / 4;
  float x[PER], y[PER];
  Word<S>::wide(a, x), Word<S>::wide(b, y);
#pragma unroll
  for (int i = 0; i < PER; ++i) x[i] = larger(x[i], y[i]);
  return Word<S>::narrow(x);
}

template <>
struct Word<float> {
  static __device__ __forceinline__ void wide(unsigned w, float* x) { memcpy(x, &w, sizeof(w)); }
  static __device__ __forceinline__ unsigned narrow(const float* x) {
    unsigned w;
    memcpy(&w, x, sizeof(w));
    return w;
  }
  static __device__ __forceinline__ unsigned largest(unsigned a, unsigned b) {
    return largest_as_float<float>(a, b);
  }
};

template <>
struct Word<__nv_bfloat16> {
  static __device__ __forceinline__ void wide(unsigned w, float* x) {
    const unsigned low = w << 16, high = w & 0xffff0000u;  // an instruction each
    memcpy(x, &low, sizeof(low));
    memcpy(x + 1, &high, sizeof(high));
  }
  static __device__ __forceinline__ unsigned narrow(const float* x) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x[0], x[1]);
    unsigned w;
    memcpy(&w, &both, sizeof(w));
    return w;
  }
  static __device__ __forceinline__ unsigned largest(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
#else
    return largest_as_float<__nv_bfloat16>(a, b);
#endif
  }
};

template <>
struct Word<__half> {
  static __device__ __forceinline__ void wide(unsigned w, float* x) {
    __half2 both;
    memcpy(&both, &w, sizeof(w));
    const float2 two = __half22float2(both);
    x[0] = two.x, x[1] = two.y;
  }
  static __device__ __forceinline__ unsigned narrow(const float* x) {
    const __half2 both = __floats2half2_rn(x[0], x[1]);
    unsigned w;
    memcpy(&w, &both, sizeof(w));
    return w;
  }
  static __device__ __forceinline__ unsigned largest(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
#else
    return largest_as_float<__half>(a, b);
#endif
  }
};

// NaN left out; finite for columns of -inf alone. One instruction finds the largest of 32 integers, whose
// order that of floats is once those below 0 are turned around.
__device__ __forceinline__ float warp_max(float top) {
  top = larger(top, -FLT_MAX);
  int bits;
  memcpy(&bits, &top, sizeof(bits));
  bits = __reduce_max_sync(0xffffffff, bits ^ (bits >> 31 & INT_MAX));
  bits ^= bits >> 31 & INT_MAX;
  memcpy(&top, &bits, sizeof(top));
  return top;
}

template <int E>
__device__ __forceinline__ float warp_max(const float (&x)[E]) {
  float part[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
  for (int j = 4; j < E; ++j) part[j % 4] = larger(part[j % 4], x[j]);
  return warp_max(larger(larger(part[0], part[1]), larger(part[2], part[3])));
}

// The lane's columns of a tile, as they lie in memory.
template <typename S, int N>
struct Words {
  static constexpr int E = N * WIDTH<S>, PER = WIDTH<S> / 4;
  uint4 at[N];

  // p: the lane's first column.
  __device__ __forceinline__ void load(const S* p) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = read(p + i * WARP * WIDTH<S>);
  }
  __device__ __forceinline__ void wide(float (&x)[E]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned words[4] = {at[i].x, at[i].y, at[i].z, at[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) Word<S>::wide(words[j], x + (i * 4 + j) * PER);
    }
  }
  // Of the lane; NaN left out.
  __device__ __forceinline__ float largest() const {
    unsigned part[4] = {at[0].x, at[0].y, at[0].z, at[0].w};
#pragma unroll
    for (int i = 1; i < N; ++i) {
      const unsigned words[4] = {at[i].x, at[i].y, at[i].z, at[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) part[j] = Word<S>::largest(part[j], words[j]);
    }
    float top[PER];
    Word<S>::wide(Word<S>::largest(Word<S>::largest(part[0], part[1]), Word<S>::largest(part[2], part[3])), top);
    return larger(top[0], top[PER - 1]);
  }
};

template <typename S, int N>
__device__ __forceinline__ void store_whole(S* p, const float (&x)[N * WIDTH<S>]) {
  constexpr int PER = WIDTH<S> / 4;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float* from = x + i * WIDTH<S>;
    const uint4 word = {Word<S>::narrow(from), Word<S>::narrow(from + PER), Word<S>::narrow(from + 2 * PER),
                        Word<S>::narrow(from + 3 * PER)};
    *reinterpret_cast<uint4*>(p + i * WARP * WIDTH<S>) = word;
  }
}

// The sum of f(j) over the lane's columns, in four chains.
template <int E, typename F>
__device__ __forceinline__ float lane_sum(const F& f) {
  float part[4] = {};
#pragma unroll
  for (int j = 0; j < E; ++j) part[j % 4] += f(j);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Four sums over a warp by six shuffles: lanes 8 i to 8 i + 7 get that of x[i].
__device__ __forceinline__ float warp_sums(const float (&x)[4], int lane) {
  const bool high = lane & 16, mid = lane & 8;
  float a = high ? x[2] : x[0], b = high ? x[3] : x[1];
  a += __shfl_xor_sync(0xffffffff, high ? x[0] : x[2], 16);
  b += __shfl_xor_sync(0xffffffff, high ? x[1] : x[3], 16);
  float c = mid ? b : a;
  c += __shfl_xor_sync(0xffffffff, mid ? a : b, 8);
#pragma unroll
  for (int i = 4; i; i /= 2) c += __shfl_xor_sync(0xffffffff, c, i);
  return c;
}

// Rows of fp32 that a lane keeps for itself in shared memory, 16 bytes beside its neighbours' 16.
template <int E>
class Shelf {
  float4* base_;

 public:
  __device__ __forceinline__ Shelf(void* shared, int rows, int warp, int lane)
      : base_(static_cast<float4*>(shared) + warp * rows * (E / 4 * WARP) + lane) {}
  __device__ __forceinline__ void put(int row, const float (&x)[E]) {
#pragma unroll
    for (int j = 0; j < E / 4; ++j)
      base_[(row * (E / 4) + j) * WARP] = {x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]};
  }
  // f(kept, j) for every column j.
  template <typename F>
  __device__ __forceinline__ void each(int row, const F& f) const {
#pragma unroll
    for (int j = 0; j < E / 4; ++j) {
      const float4 v = base_[(row * (E / 4) + j) * WARP];
      f(v.x, 4 * j), f(v.y, 4 * j + 1), f(v.z, 4 * j + 2), f(v.w, 4 * j + 3);
    }
  }
  __device__ __forceinline__ float dot(int row, const float (&x)[E]) const {
    float part[4] = {};
    each(row, [&](float kept, int j) { part[j % 4] += kept * x[j]; });
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

}  // namespace mokd::cuda
