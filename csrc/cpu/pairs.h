// Matrices of bf16 as pairs of numbers, which is what AVX-512 multiplies: a product of pairs adds two terms.
//
// The left side of a product has its pairs along the terms, a number of 32 bits each; the right side has the
// pairs of two terms beside each other, a vector of columns. `transposed` and `paired` make a right side of rows.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "vector.h"

namespace mokd::cpu {
namespace {

struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

template <>
struct Register<Pair> : Register<uint32_t> {};

inline void add_term(Vec<float>& sum, Pair a, Vec<Pair> b) {
  const __m512i left = _mm512_set1_epi32(int(a.bits)), right = reinterpret_cast<__m512i>(b);
  sum = reinterpret_cast<Vec<float>>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)left, (__m512bh)right));
}

constexpr int64_t L = 16;  // numbers of a vector

inline int64_t vectors(int64_t n) { return (n + L - 1) / L; }

inline const Pair* pairs(const void* at) { return static_cast<const Pair*>(at); }

// 16 rows of 16 numbers of 32 bits, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int k = 0; k < 4; ++k) {
      t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
      t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
    }
  for (int k = 0; k < 8; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
    r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
  }
}

// [n] columns wide, from rows of n0 numbers: to[j][i] = the pair j of row i; zeros up to whole vectors of rows.
inline void transposed(const uint16_t* rows, int64_t step, int64_t n, int64_t width, Pair* to) {
  const int64_t columns = vectors(n) * L, half = width / 2;
  for (int64_t i0 = 0; i0 < n; i0 += L)
    for (int64_t j0 = 0; j0 < half; j0 += L) {
      const __mmask16 own = half - j0 < L ? (1u << (half - j0)) - 1 : 0xffff;
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = i0 + i < n ? _mm512_maskz_loadu_epi32(own, rows + (i0 + i) * step + 2 * j0) : _mm512_setzero_si512();
      transpose(r);
      for (int j = 0; j < 16 && j0 + j < half; ++j) _mm512_storeu_si512(to + (j0 + j) * columns + i0, r[j]);
    }
}

// Rows 2 i and 2 i + 1 beside each other, 16 pairs at a time, to to(i, column); after an odd row zeros.
template <typename To>
void paired(const uint16_t* rows, int64_t step, int64_t n, int64_t width, const To& to) {
  const auto wide = [](const uint16_t* at) { return _mm512_cvtepu16_epi32(load<__m256i>(at)); };
  for (int64_t i = 0; 2 * i < n; ++i, rows += 2 * step)
    for (int64_t k = 0; k < width; k += L) {
      __m512i both = wide(rows + k);
      if (2 * i + 1 < n) both = _mm512_or_si512(both, _mm512_slli_epi32(wide(rows + step + k), 16));
      _mm512_storeu_si512(to(i, k), both);
    }
}

// ... to a matrix.
inline void paired(const uint16_t* rows, int64_t step, int64_t n, int64_t width, Pair* to) {
  paired(rows, step, n, width, [&](int64_t i, int64_t k) { return to + i * width + k; });
}

inline void store_bf16(uint16_t* to, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
}

}  // namespace
}  // namespace mokd::cpu
