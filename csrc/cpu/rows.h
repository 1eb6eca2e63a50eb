// Rows of any dtype as fp32, and loops that the compiler vectorises; for one instruction set, RFKERNELS_ISA.
#pragma once

#include <cmath>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define SIMD _Pragma("omp simd")
#define SIMD_SUM(...) _Pragma(STRING(omp simd reduction(+ : __VA_ARGS__)))
#define STRING(x) #x

namespace rfkernels {
namespace RFKERNELS_ISA {
namespace {

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void load_f16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) {
    _Float16 half;
    std::memcpy(&half, from + i, 2);
    to[i] = static_cast<float>(half);
  }
}

inline void store_f16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) {
    const _Float16 half = static_cast<_Float16>(from[i]);
    std::memcpy(to + i, &half, 2);
  }
}

// n elements from `from` as fp32: where they lie if they are, else in `buffer`.
inline const float* load(const void* from, Dtype dtype, float* buffer, int64_t n) {
  if (dtype == F32) return static_cast<const float*>(from);
  if (dtype == F16) {
    load_f16(static_cast<const uint16_t*>(from), buffer, n);
    return buffer;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from);
  SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = from_bf16(bits[i]);
  return buffer;
}

inline void store(const float* from, void* to, Dtype dtype, int64_t n) {
  if (dtype == F32) {
    if (from != to) std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == F16) {
    store_f16(from, static_cast<uint16_t*>(to), n);
  } else {
    uint16_t* bits = static_cast<uint16_t*>(to);
    SIMD for (int64_t i = 0; i < n; ++i) bits[i] = to_bf16(from[i]);
  }
}

inline int64_t bytes(Dtype dtype) { return dtype == F32 ? 4 : 2; }

inline void* at(const Rows& rows, int64_t b, int64_t s) {
  return static_cast<char*>(rows.data) + (b * rows.batch + s * rows.token) * bytes(rows.dtype);
}

// Where a result of n channels is computed: in place if it is fp32, else in `buffer`, to be stored.
inline float* target(const Rows& rows, int64_t b, int64_t s, float* buffer) {
  return rows.dtype == F32 ? static_cast<float*>(at(rows, b, s)) : buffer;
}

// A vector's values for tokens of sample b. One that all tokens share is read once.
struct Vector {
  Rows rows;
  float* buffer;
  int64_t n;
  const float* shared = nullptr;

  Vector(const Rows& given, int64_t b, float* scratch, int64_t channels) : rows(given), buffer(scratch), n(channels) {
    if (rows.data && rows.token == 0) shared = load(at(rows, b, 0), rows.dtype, buffer, n);
  }
  const float* of(int64_t b, int64_t s) const {
    return shared || !rows.data ? shared : load(at(rows, b, s), rows.dtype, buffer, n);
  }
};

}  // namespace
}  // namespace RFKERNELS_ISA
}  // namespace rfkernels
