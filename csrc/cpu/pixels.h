// Rows of pixels: bytes as vectors of floats, and channels taken apart and put together.
#pragma once
#include "vector.h"

namespace mokd::cpu {
namespace {

typedef Vec<float> Floats;
typedef int32_t Ints __attribute__((vector_size(WIDTH)));

inline Floats floats(const float* p) { return load<Floats>(p); }

inline Floats floats(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(p))));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
#else
  Ints v;
  for (int i = 0; i < LANES<float>; ++i) v[i] = p[i];
  return __builtin_convertvector(v, Floats);
#endif
}

// Numbers from 0 to 255 to bytes, their fractions cut off.
inline void put_bytes(uint8_t* p, Floats x) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(reinterpret_cast<__m512>(x))));
#elif defined(__AVX2__)
  const __m256i v = _mm256_cvttps_epi32(reinterpret_cast<__m256>(x));
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
#else
  const Ints v = __builtin_convertvector(x, Ints);
  for (int i = 0; i < LANES<float>; ++i) p[i] = uint8_t(v[i]);
#endif
}

// Of numbers that are not negative.
inline Floats whole(Floats x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats); }

inline Floats at_most(float high, Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_min_ps(_mm512_set1_ps(high), reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_min_ps(_mm256_set1_ps(high), reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_min_ps(_mm_set1_ps(high), reinterpret_cast<__m128>(x)));
#else
  return x > high ? Floats{} + high : x;
#endif
}

inline Floats smaller(Floats a, Floats b) { return -larger(-a, -b); }

inline Floats absolute(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Bits>(x) & 0x7fffffff); }

// a * factor + c, rounded once where the level can: this file's loops are compiled without contraction.
inline Floats multiply_add(Floats a, float factor, Floats c) {
  const Floats b = factor - Floats{};  // of 0 + factor something would be left: it may be -0
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// Lanes of a, then of b, by their numbers.
template <typename F>
inline Floats shuffle(Floats a, Floats b, const F& from) {
  constexpr int L = LANES<float>;
#ifdef __clang__
  Floats v;
  for (int i = 0; i < L; ++i) v[i] = from(i) < L ? a[from(i)] : b[from(i) - L];
  return v;
#else
  Bits lanes;
  for (int i = 0; i < L; ++i) lanes[i] = from(i);
  return __builtin_shuffle(a, b, lanes);
#endif
}

// to[3 i + c] = x[c][i]: the J-th vector of the three.
template <int J>
inline Floats interleaved(const Floats* x) {
  constexpr int L = LANES<float>;
  const Floats two = shuffle(x[0], x[1], [](int i) { return (J * L + i) / 3 + (J * L + i) % 3 % 2 * L; });
  return shuffle(two, x[2], [](int i) { return (J * L + i) % 3 == 2 ? (J * L + i) / 3 + L : i; });
}

template <int C>
inline void put_interleaved(float* to, const Floats* x) {
  constexpr int L = LANES<float>;
  if constexpr (C == 1) {
    store(to, x[0]);
  } else {
    store(to, interleaved<0>(x)), store(to + L, interleaved<1>(x)), store(to + 2 * L, interleaved<2>(x));
  }
}

// A row's bytes [n][C] to planes `apart` from each other, each with zeros up to there.
template <int C>
void take_apart(const uint8_t* from, int64_t n, bool flip, uint8_t* to, int64_t apart) {
  for (int c = 0; c < C; ++c) {
    uint8_t* plane = to + c * apart;
    if (flip)
      for (int64_t i = 0; i < n; ++i) plane[n - 1 - i] = from[i * C + c];
    else
      for (int64_t i = 0; i < n; ++i) plane[i] = from[i * C + c];
    std::memset(plane + n, 0, apart - n);
  }
}

}  // namespace
}  // namespace mokd::cpu
