// Vectors as wide as the x86-64 level's registers, rows of any type as vectors, and 2^x.
// Everything has internal linkage: each level compiles its own.
#pragma once
#include <cfloat>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "../core/distill.h"

namespace mokd::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;  // bytes
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

template <typename A>
struct Register {
  static constexpr int lanes = WIDTH / sizeof(A);
  typedef A type __attribute__((vector_size(WIDTH)));
};

template <typename A>
using Vec = typename Register<A>::type;
template <typename A>
constexpr int LANES = Register<A>::lanes;

template <typename V, typename A>
inline V load(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename A>
inline void store(A* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// The `count` values that are left, then `fill`.
template <typename A>
inline Vec<A> load_tail(const A* p, int64_t count, A fill) {
  Vec<A> v = Vec<A>{} + fill;
  std::memcpy(&v, p, count * sizeof(A));
  return v;
}

// Halves are joined until one number is left: a chain of additions would take longer than the loop
// whose sum it is.
template <typename A, int BYTES, typename F>
inline A reduce(const void* from, const F& join) {
  if constexpr (BYTES == sizeof(A)) {
    return *static_cast<const A*>(from);
  } else {
    typedef A Part __attribute__((vector_size(BYTES / 2)));
    const Part* halves = static_cast<const Part*>(from);
    const Part joined = join(halves[0], halves[1]);
    return reduce<A, BYTES / 2>(&joined, join);
  }
}

template <typename A>
inline A reduce_add(Vec<A> v) {
  return reduce<A, WIDTH>(&v, [](auto a, auto b) { return a + b; });
}

template <typename A>
inline A reduce_max(Vec<A> v) {
  return reduce<A, WIDTH>(&v, [](auto a, auto b) { return a > b ? a : b; });
}

// Sum of a[k] b[k].
inline float dot(const float* a, const float* b, int64_t n) {
  constexpr int L = LANES<float>;
  Vec<float> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * L <= n; k += 4 * L)
    for (int i = 0; i < 4; ++i) sum[i] += load<Vec<float>>(a + k + i * L) * load<Vec<float>>(b + k + i * L);
  for (; k < n; k += L) {
    const int64_t rest = n - k < L ? n - k : L;
    sum[0] += load_tail(a + k, rest, 0.0f) * load_tail(b + k, rest, 0.0f);
  }
  return reduce_add<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

typedef uint32_t Bits __attribute__((vector_size(WIDTH)));
typedef uint16_t Half __attribute__((vector_size(WIDTH / 2)));

// a > b ? a : b, so b where one is NaN, for which the compiler does not always find the one instruction.
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

inline Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec<float>>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Vec<float> at_least(float low, Vec<float> x) { return larger(Vec<float>{} + low, x); }  // NaN for NaN

// 2^x for x <= 0: 0 for -inf, NaN for NaN. Relative error 1.7e-7: the polynomial of degree 5 is
// minimax on [-1/2, 1/2]. AVX-512 splits x and scales by a power of two in one instruction each; elsewhere
// adding 1.5 * 2^23 rounds x to an integer, which then becomes the exponent, -127 and below the number 0.
inline Vec<float> exp2_negative(Vec<float> x) {
#if defined(__AVX512DQ__)
  const __m512 all = reinterpret_cast<__m512>(x);
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm512_reduce_ps(all, _MM_FROUND_NO_EXC));
#else
  const float magic = 12582912.0f + 127.0f;
  const Vec<float> y = at_least(-127.0f, x), shifted = y + magic, r = y - (shifted - magic);
#endif
  Vec<float> p = r * 1.32647273e-3f + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return reinterpret_cast<Vec<float>>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), _mm512_roundscale_ps(all, _MM_FROUND_NO_EXC)));
#else
  return p * reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(shifted) << 23);
#endif
}

inline Vec<double> exp2_negative(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

inline float widen(uint16_t h, Type type) {
  union { uint32_t i; float f; } bits;
  if (type == BF16) {
    bits.i = uint32_t(h) << 16;
    return bits.f;
  }
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  bits.i = rest << 13;
  bits.f *= 5.192296858534828e33f;  // 2^112: moves the exponent, subnormals too
  if (rest >= 0x7c00) bits.i |= 0x7f800000;
  bits.i |= sign;
  return bits.f;
}

inline uint16_t narrow_bf16(float x) {
  union { float f; uint32_t i; } bits = {x};
  uint32_t rounded = (bits.i + 0x7fff + ((bits.i >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : uint16_t(rounded);
}

inline uint16_t narrow_f16(float x) {
  union { float f; uint32_t i; } bits = {x};
  uint32_t sign = (bits.i >> 16) & 0x8000, rest = bits.i & 0x7fffffff;
  union { uint32_t i; float f; } abs = {rest};
  if (rest >= 0x47800000) return sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (rest < 0x38800000) {  // subnormal: let the addition round
    abs.f += 0.5f;
    return sign | uint16_t(abs.i - 0x3f000000);
  }
  rest += 0xc8000fff + ((rest >> 13) & 1);
  return sign | uint16_t(rest >> 13);
}

inline Vec<float> widen_bf16(Half h) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Bits) << 16);
}

// To nearest, ties to even, by adding 1.5 * 2^16 times the value's own power of two: three
// instructions where integer rounding with its NaN case takes seven. Infinity, and numbers from 2^111
// on, become infinite or NaN. The lower half of a result is 0, but not of subnormal numbers: these are
// cut off.
inline Bits round_bf16(Vec<float> x) {
  Vec<float> magic = reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(x) & 0x7f800000) * 98304.0f;
  return reinterpret_cast<Bits>((x + magic) - magic);
}

inline Half narrow_bf16(Vec<float> x) { return __builtin_convertvector(round_bf16(x) >> 16, Half); }

inline const char* address(const Rows& rows, int64_t b, int64_t k) {
  return static_cast<const char*>(rows.data) + (b * rows.image + k * rows.column) * item_size(rows.type);
}

// The values of a row's n columns from k0: where they lie, or widened into `buffer`.
template <typename A>
const A* values(const Rows& rows, int64_t b, int64_t k0, int64_t n, A* buffer) {
  const char* at = address(rows, b, k0);
  const int64_t step = rows.column;
  int64_t k = 0;
  if (rows.type == F32) {
    const float* p = reinterpret_cast<const float*>(at);
    if (sizeof(A) == 4 && step == 1) return reinterpret_cast<const A*>(p);
    for (; k < n; ++k) buffer[k] = A(p[k * step]);
  } else if (rows.type == F64) {
    const double* p = reinterpret_cast<const double*>(at);
    if (sizeof(A) == 8 && step == 1) return reinterpret_cast<const A*>(p);
    for (; k < n; ++k) buffer[k] = A(p[k * step]);
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(at);
    if (step == 1 && sizeof(A) == 4 && rows.type == BF16)
      for (; k + LANES<float> <= n; k += LANES<float>) store(buffer + k, widen_bf16(load<Half>(p + k)));
#ifdef __F16C__
    if (step == 1 && sizeof(A) == 4 && rows.type == F16)
      for (; k + 8 <= n; k += 8) store(buffer + k, _mm256_cvtph_ps(load<__m128i>(p + k)));
#endif
    for (; k < n; ++k) buffer[k] = widen(p[k * step], rows.type);
  }
  return buffer;
}

// x becomes the bytes of `type`, in place.
template <typename A>
void narrow(Type type, int64_t n, A* x) {
  if (type == F32 || type == F64) return;
  uint16_t* p = reinterpret_cast<uint16_t*>(x);
  int64_t k = 0;
  if (sizeof(A) == 4 && type == BF16)
    for (; k + LANES<float> <= n; k += LANES<float>) store(p + k, narrow_bf16(load<Vec<float>>(x + k)));
#ifdef __F16C__
  if (sizeof(A) == 4 && type == F16)
    for (; k + 8 <= n; k += 8) store(p + k, _mm256_cvtps_ph(load<__m256>(x + k), 0));
#endif
  for (; k < n; ++k) {
    float value;
    A wide;
    std::memcpy(&wide, x + k, sizeof(A));
    value = float(wide);
    uint16_t half = type == BF16 ? narrow_bf16(value) : narrow_f16(value);
    std::memcpy(p + k, &half, 2);
  }
}

// A register to aligned memory around the caches.
template <typename A>
inline void stream_vector(A* to, Vec<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load<__m512i>(&v));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load<__m256i>(&v));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), load<__m128i>(&v));
#else
  store(to, v);
#endif
}

// How a loop reads and writes a row, two vectors at a time from column k, and where in a block of
// teacher exponentials (a tile) the same columns stand: numbers ...
template <typename A>
struct Plain {
  static constexpr bool paired = false;
  const A* x;
  A* g;
  int64_t first;  // a loop's first column in the tiles
  void skip(int64_t k) { x += k, g += k, first += k; }
  template <int I>
  Vec<A> get(int64_t k) const {
    return load<Vec<A>>(x + k + I * LANES<A>);
  }
  template <int I, typename P>
  static P* tile(P* e, int64_t k) {
    return e + k + I * LANES<A>;
  }
  Vec<A> tail(int64_t k, int64_t count, A fill) const { return load_tail(x + k, count, fill); }
  void put(int64_t k, Vec<A> first, Vec<A> second) const {
    store(g + k, first), store(g + k + LANES<A>, second);
  }
};

// ... or numbers less a centre ...
template <typename A>
struct Centred : Plain<A> {
  const A* center;
  template <int I>
  Vec<A> get(int64_t k) const {
    return Plain<A>::template get<I>(k) - load<Vec<A>>(center + k + I * LANES<A>);
  }
  Vec<A> tail(int64_t k, int64_t count, A fill) const {
    return Plain<A>::tail(k, count, fill) - load_tail(center + k, count, A(0));
  }
};

// ... or a row whose gradient is aligned and streamed to its place ...
template <typename A>
struct Streamed : Plain<A> {
  void put(int64_t k, Vec<A> first, Vec<A> second) const {
    stream_vector(this->g + k, first), stream_vector(this->g + k + LANES<A>, second);
  }
};

// ... or a row in bf16, where the first vector holds the first, third, ... of the columns and the second
// the others: a shift and a mask take the two out of one register, and put them back. Its tiles are split
// into two planes, of even columns and of odd ones: those of the second vector are `apart` from the first's.
struct PairedBf16 {
  static constexpr bool paired = true;
  const uint16_t* x;
  uint16_t* g;
  int64_t first, apart;
  void skip(int64_t k) {  // of a row that begins in an even column
    x += k, g += k, first += k >> 1;
    if (k & 1) first += apart, apart = 1 - apart;
  }
  template <int I>
  Vec<float> get(int64_t k) const {
    const Bits both = load<Bits>(x + k);
    return reinterpret_cast<Vec<float>>(I ? both & 0xffff0000 : both << 16);
  }
  template <int I, typename P>
  P* tile(P* e, int64_t k) const {
    return e + k / 2 + I * apart;
  }
  static Bits join(Vec<float> first, Vec<float> second) {
    return round_bf16(first) >> 16 | (round_bf16(second) & 0xffff0000);
  }
  void put(int64_t k, Vec<float> first, Vec<float> second) const { store(g + k, join(first, second)); }
};

struct StreamedBf16 : PairedBf16 {
  void put(int64_t k, Vec<float> first, Vec<float> second) const {
    stream_vector(reinterpret_cast<float*>(g + k), reinterpret_cast<Vec<float>>(join(first, second)));
  }
};

// The first, third, ... (I = 0) or the other (I = 1) of two vectors' numbers.
template <int I>
inline Vec<float> every_other(const float* x) {
  constexpr int L = LANES<float>;
  const Vec<float> a = load<Vec<float>>(x), b = load<Vec<float>>(x + L);
#ifdef __clang__
  Vec<float> half;
  for (int i = 0; i < L / 2; ++i) half[i] = a[2 * i + I], half[i + L / 2] = b[2 * i + I];
  return half;
#else
  Bits from;
  for (int i = 0; i < L; ++i) from[i] = 2 * i + I;
  return __builtin_shuffle(a, b, from);
#endif
}

struct CentredBf16 : PairedBf16 {
  const float* center;
  template <int I>
  Vec<float> get(int64_t k) const {
    return PairedBf16::get<I>(k) - every_other<I>(center + k);
  }
};

// Splits n numbers into a tile.
inline const float* split(const float* from, int64_t n, float* to, int64_t apart) {
  constexpr int L = LANES<float>;
  int64_t k = 0;
  for (; k + 2 * L <= n; k += 2 * L) {
    store(to + k / 2, every_other<0>(from + k));
    store(to + k / 2 + apart, every_other<1>(from + k));
  }
  for (; k < n; ++k) to[k / 2 + k % 2 * apart] = from[k];
  return to;
}

// Bytes to memory around the caches: what is written once and read much later should push nothing out.
inline void stream(void* to, const void* from, int64_t bytes) {
  char* p = static_cast<char*>(to);
  const char* q = static_cast<const char*>(from);
  int64_t head = -reinterpret_cast<intptr_t>(p) & (WIDTH - 1);
  head = head < bytes ? head : bytes;
  std::memcpy(p, q, head);
  p += head, q += head, bytes -= head;
  for (; bytes >= WIDTH; p += WIDTH, q += WIDTH, bytes -= WIDTH)
    stream_vector(reinterpret_cast<float*>(p), load<Vec<float>>(q));
  std::memcpy(p, q, bytes);
}

// Streamed stores become visible to other threads.
inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace mokd::cpu
