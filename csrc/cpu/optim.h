// AdamW with states of few bits: the kernel of kernels.h. Every operation is that of rfkernels/optim/reference.py, in its
// order; roots are exact, where PyTorch's may be off in their last bit.
#pragma once

#include "rows.h"

namespace rfkernels {
namespace RFKERNELS_ISA {
namespace {

inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 24 random bits for each of n elements from a column on; row: the hash of what else they hang on.
inline void noise(uint32_t row, int64_t column, int64_t n, int32_t* bits) {
  const uint32_t first = static_cast<uint32_t>(column);
  SIMD for (int64_t i = 0; i < n; ++i)
    bits[i] = static_cast<int32_t>(mixed(row ^ (first + static_cast<uint32_t>(i))) >> 8);
}

inline float fourth(float x) {
  const float square = x * x;
  return square * square;
}

// fp32 to bf16, up or down at random in proportion.
inline void round_at_random(const float* from, const int32_t* bits, uint16_t* to, int64_t n) {
  SIMD for (int64_t i = 0; i < n; ++i) {
    uint32_t value;
    std::memcpy(&value, from + i, 4);
    to[i] = static_cast<uint16_t>((value + static_cast<uint32_t>(bits[i] >> 8)) >> 16);
  }
}

// Codes of magnitudes of x, at random in proportion, and their scale. A NaN makes the scale one.
inline float encode(const float* x, const int32_t* bits, float codes, float* made, int64_t n) {
  int32_t largest = 0;  // as integers magnitudes have the same order, a NaN above all
  _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < n; ++i) {
    int32_t magnitude;
    std::memcpy(&magnitude, x + i, 4);
    magnitude &= 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale;
  std::memcpy(&scale, &largest, 4);
  if (scale != scale) {
    std::memset(made, 0, n * sizeof(float));
    return scale;
  }
  const float least = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
  SIMD for (int64_t i = 0; i < n; ++i) {
    float share = std::fabs(x[i]) / least;
    share = share < 1.f ? share : 1.f;
    float low = static_cast<float>(static_cast<int32_t>(std::sqrt(std::sqrt(share)) * codes));
    low = low < codes - 1.f ? low : codes - 1.f;
    const float below = fourth(low / codes), above = fourth((low + 1.f) / codes);
    const bool up = static_cast<float>(bits[i]) * 5.9604645e-8f < (share - below) / (above - below);
    made[i] = low + (up ? 1.f : 0.f);
  }
  return scale;
}

void adamw(const AdamW& how, uint32_t row, int64_t column, int64_t n, void* weight, Dtype weight_dtype,
           const void* gradient, Dtype gradient_dtype, void* first, void* second, float* first_scale,
           float* second_scale, States states) {
  float weights[kScaled], gradients[kScaled], m[kScaled], v[kScaled], made[kScaled];
  int32_t bits[kScaled];
  const float* g = load(gradient, gradient_dtype, gradients, n);
  if (how.scaled) {
    for (int64_t i = 0; i < n; ++i) gradients[i] = g[i] / how.grad_scale;
    g = gradients;
  }
  if (states == EIGHT) {
    const int8_t* code = static_cast<const int8_t*>(first);
    const uint8_t* root = static_cast<const uint8_t*>(second);
    const float of_m = *first_scale, of_v = *second_scale;
    SIMD for (int64_t i = 0; i < n; ++i) {
      const float magnitude = fourth(static_cast<float>(code[i]) / 127.f);
      m[i] = (code[i] < 0 ? -magnitude : magnitude) * of_m;
      const float r = fourth(static_cast<float>(root[i]) / 255.f) * of_v;
      v[i] = r * r;
    }
  } else {
    const Dtype dtype = states == HALF ? BF16 : F32;
    const float *m_read = load(first, dtype, m, n), *v_read = load(second, dtype, v, n);
    if (dtype == F32) {
      std::memcpy(m, m_read, n * sizeof(float));
      std::memcpy(v, v_read, n * sizeof(float));
    }
  }
  const float* p = load(weight, weight_dtype, weights, n);
  SIMD for (int64_t i = 0; i < n; ++i) {
    m[i] = how.beta1 * m[i] + how.rest1 * g[i];
    v[i] = how.beta2 * v[i] + how.rest2 * g[i] * g[i];
    const float update = how.lr * (m[i] / how.first) / (std::sqrt(v[i] / how.second) + how.eps);
    weights[i] = how.decay * p[i] - update;
  }
  const auto drawn = [&](uint32_t purpose) {
    noise(mixed(mixed(how.key ^ purpose) ^ row), column, n, bits);
    return bits;
  };
  if (weight_dtype == BF16)
    round_at_random(weights, drawn(2), static_cast<uint16_t*>(weight), n);
  else
    store(weights, weight, weight_dtype, n);
  if (states == EIGHT) {
    int8_t* code = static_cast<int8_t*>(first);
    uint8_t* root = static_cast<uint8_t*>(second);
    *first_scale = encode(m, drawn(0), 127.f, made, n);
    SIMD for (int64_t i = 0; i < n; ++i) {
      const int32_t value = static_cast<int32_t>(made[i]);
      code[i] = static_cast<int8_t>(m[i] < 0.f ? -value : value);
    }
    SIMD for (int64_t i = 0; i < n; ++i) v[i] = std::sqrt(v[i]);
    *second_scale = encode(v, drawn(1), 255.f, made, n);
    SIMD for (int64_t i = 0; i < n; ++i)
      root[i] = static_cast<uint8_t>(made[i] > 1.f ? static_cast<int32_t>(made[i]) : 1);
  } else if (states == HALF) {
    round_at_random(m, drawn(0), static_cast<uint16_t*>(first), n);
    round_at_random(v, drawn(1), static_cast<uint16_t*>(second), n);
  } else {
    std::memcpy(first, m, n * sizeof(float));
    std::memcpy(second, v, n * sizeof(float));
  }
}

}  // namespace
}  // namespace RFKERNELS_ISA
}  // namespace rfkernels
