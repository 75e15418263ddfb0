// What the C++ files share: vectors, whose operations are the same in every place that uses them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;  // wider than the machine's, gcc keeps vectors in memory
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

template <typename vector = lanes>
inline vector load(const void* p) {
  vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, lanes x) { __builtin_memcpy(p, &x, sizeof x); }
inline lanes all(float x) { return x - lanes{}; }

// x * y + sum, rounded once where the machine can: the compiler is not left the choice
inline lanes multiply_add(lanes x, lanes y, lanes sum) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

// sums of n <= 4 vectors' numbers: halves first, at last neighbours
template <int n>
inline void add_up(const lanes* x, float* to) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 half[4] = {};
  for (int i = 0; i < n; ++i) {
    v4 part[LANES / 4];
    __builtin_memcpy(part, x + i, sizeof part);
    if constexpr (LANES == 16) part[0] += part[2], part[1] += part[3];
    half[i] = part[0] + part[1];
  }
#ifdef __AVX2__
  const __m128 low = _mm_hadd_ps((__m128)half[0], (__m128)half[1]);
  const __m128 high = _mm_hadd_ps((__m128)half[2], (__m128)half[3]), sums = _mm_hadd_ps(low, high);
  __builtin_memcpy(to, &sums, n * 4);
#else
  for (int i = 0; i < n; ++i) to[i] = (half[i][0] + half[i][1]) + (half[i][2] + half[i][3]);
#endif
}

inline float widen(float x) { return x; }
inline float widen(c10::BFloat16 x) { return static_cast<float>(x); }
inline float widen(c10::Half x) { return static_cast<float>(x); }

// LANES numbers in float32
inline lanes wide(const float* p) { return load(p); }
inline lanes wide(const c10::Half* p) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(::load<__m256i>(p));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(::load<__m128i>(p));
#else
  lanes x;
  for (int i = 0; i < LANES; ++i) x[i] = widen(p[i]);
  return x;
#endif
}

}  // namespace
