// The adaLN family: kernels of kernels.h.
#pragma once

#include "rows.h"

namespace rfkernels {
namespace RFKERNELS_ISA {
namespace {

inline void statistics(const Norm& norm, const float* x, float* mean, float* rstd) {
  const int64_t n = norm.channels;
  float center = 0.f;
  if (!norm.rms) {
    float sum = 0.f;
    SIMD_SUM(sum) for (int64_t i = 0; i < n; ++i) sum += x[i];
    center = sum / static_cast<float>(n);
  }
  float rest = 0.f, square = 0.f;             // rest: what rounding left of the mean; of a constant row it is all there is
  SIMD_SUM(rest, square) for (int64_t i = 0; i < n; ++i) {
    const float off = x[i] - center;
    rest += off;
    square += off * off;
  }
  rest = norm.rms ? 0.f : rest / static_cast<float>(n);
  const float variance = square / static_cast<float>(n) - rest * rest;
  *mean = center + rest;
  *rstd = 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + norm.eps);
}

inline void modulate(const Norm& norm, const float* x, float mean, float rstd, const float* shift, const float* scale,
                     float* y) {
  const int64_t n = norm.channels;
  const float one = norm.one;
  if (shift && scale) {
    SIMD for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * (one + scale[i]) + shift[i];
  } else if (scale) {
    SIMD for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * (one + scale[i]);
  } else if (shift) {
    SIMD for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd + shift[i];
  } else {
    SIMD for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd;
  }
}

void adaln(Norm norm, int64_t b, int64_t begin, int64_t end, Rows x, Rows shift, Rows scale, Rows y, float* mean,
           float* rstd, float* scratch) {
  const int64_t n = norm.channels;
  const Vector shifts(shift, b, scratch, n), scales(scale, b, scratch + n, n);
  for (int64_t s = begin; s < end; ++s) {
    const float* row = load(at(x, b, s), x.dtype, scratch + 2 * n, n);
    statistics(norm, row, mean + s, rstd + s);
    float* out = target(y, b, s, scratch + 3 * n);
    modulate(norm, row, mean[s], rstd[s], shifts.of(b, s), scales.of(b, s), out);
    store(out, at(y, b, s), y.dtype, n);
  }
}

inline void add_gated(int64_t n, const float* residual, const float* branch, const float* gate, float* h) {
  if (gate) {
    SIMD for (int64_t i = 0; i < n; ++i) h[i] = residual[i] + gate[i] * branch[i];
  } else {
    SIMD for (int64_t i = 0; i < n; ++i) h[i] = residual[i] + branch[i];
  }
}

void gated_adaln(Norm norm, int64_t b, int64_t begin, int64_t end, Rows residual, Rows branch, Rows gate, Rows shift,
                 Rows scale, Rows h, Rows y, float* mean, float* rstd, float* scratch) {
  const int64_t n = norm.channels;
  const Vector shifts(shift, b, scratch, n), scales(scale, b, scratch + n, n), gates(gate, b, scratch + 2 * n, n);
  for (int64_t s = begin; s < end; ++s) {
    const float* r = load(at(residual, b, s), residual.dtype, scratch + 3 * n, n);
    const float* x = load(at(branch, b, s), branch.dtype, scratch + 4 * n, n);
    float* sum = target(h, b, s, scratch + 5 * n);
    add_gated(n, r, x, gates.of(b, s), sum);
    store(sum, at(h, b, s), h.dtype, n);
    const float* row = load(at(h, b, s), h.dtype, scratch + 5 * n, n);            // as stored
    statistics(norm, row, mean + s, rstd + s);
    float* out = target(y, b, s, scratch + 3 * n);
    modulate(norm, row, mean[s], rstd[s], shifts.of(b, s), scales.of(b, s), out);
    store(out, at(y, b, s), y.dtype, n);
  }
}

void gated_residual(int64_t n, int64_t b, int64_t begin, int64_t end, Rows residual, Rows branch, Rows gate, Rows h,
                    float* scratch) {
  const Vector gates(gate, b, scratch, n);
  for (int64_t s = begin; s < end; ++s) {
    const float* r = load(at(residual, b, s), residual.dtype, scratch + n, n);
    const float* x = load(at(branch, b, s), branch.dtype, scratch + 2 * n, n);
    float* sum = target(h, b, s, scratch + 3 * n);
    add_gated(n, r, x, gates.of(b, s), sum);
    store(sum, at(h, b, s), h.dtype, n);
  }
}

inline void add_to(float* sums, const float* values, int64_t n) {
  SIMD for (int64_t i = 0; i < n; ++i) sums[i] += values[i];
}

inline void add_product_to(float* sums, const float* a, const float* b, int64_t n) {
  SIMD for (int64_t i = 0; i < n; ++i) sums[i] += a[i] * b[i];
}

// The gradient a * b of a vector: stored with its token, or added to the sums of those that share it.
inline void vector_gradient(const Rows& per_token, float* sums, int64_t b, int64_t s, const float* left,
                            const float* right, float* buffer, int64_t n) {
  if (sums) add_product_to(sums, left, right, n);
  if (!per_token.data) return;
  float* out = target(per_token, b, s, buffer);
  SIMD for (int64_t i = 0; i < n; ++i) out[i] = left[i] * right[i];
  store(out, at(per_token, b, s), per_token.dtype, n);
}

void adaln_backward(Norm norm, int64_t b, int64_t begin, int64_t end, Rows dy, Rows dh, Rows x, Rows branch, Rows gate,
                    Rows scale, const float* mean, const float* rstd, Rows dx, Rows dbranch, Rows dshift, Rows dscale,
                    Rows dgate, float* shift_sums, float* scale_sums, float* gate_sums, float* bias_sums,
                    float* scratch) {
  const int64_t n = norm.channels;
  const float one = norm.one, share = 1.f / static_cast<float>(n);
  const Vector scales(scale, b, scratch, n), gates(gate, b, scratch + n, n);
  float* const x_hat = scratch + 2 * n;
  for (int64_t s = begin; s < end; ++s) {
    const float* up = load(at(dy, b, s), dy.dtype, scratch + 3 * n, n);
    const float* row = load(at(x, b, s), x.dtype, scratch + 4 * n, n);
    const float* factor = scales.of(b, s);
    const float center = mean[s], inverse = rstd[s];
    float drift = 0.f, along = 0.f;
    if (factor) {
      SIMD_SUM(drift, along) for (int64_t i = 0; i < n; ++i) {
        const float hat = (row[i] - center) * inverse, g = up[i] * (one + factor[i]);
        x_hat[i] = hat;
        drift += g;
        along += g * hat;
      }
    } else {
      SIMD_SUM(drift, along) for (int64_t i = 0; i < n; ++i) {
        const float hat = (row[i] - center) * inverse;
        x_hat[i] = hat;
        drift += up[i];
        along += up[i] * hat;
      }
    }
    drift = norm.rms ? 0.f : drift * share;
    along *= share;
    if (shift_sums) add_to(shift_sums, up, n);
    if (dshift.data) store(up, at(dshift, b, s), dshift.dtype, n);
    vector_gradient(dscale, scale_sums, b, s, up, x_hat, scratch + 5 * n, n);
    float* out = dx.dtype == F32 ? static_cast<float*>(at(dx, b, s)) : scratch + 5 * n;
    if (factor) {
      SIMD for (int64_t i = 0; i < n; ++i)
        out[i] = (up[i] * (one + factor[i]) - drift - x_hat[i] * along) * inverse;
    } else {
      SIMD for (int64_t i = 0; i < n; ++i) out[i] = (up[i] - drift - x_hat[i] * along) * inverse;
    }
    if (dh.data) {                              // scratch rows 2 to 4 are free from here
      add_to(out, load(at(dh, b, s), dh.dtype, scratch + 2 * n, n), n);
      float* down = target(dbranch, b, s, scratch + 3 * n);
      if (gate.data) {
        const float* value = gates.of(b, s);
        const float* made = load(at(branch, b, s), branch.dtype, scratch + 4 * n, n);
        vector_gradient(dgate, gate_sums, b, s, made, out, scratch + 2 * n, n);
        SIMD for (int64_t i = 0; i < n; ++i) down[i] = value[i] * out[i];
      } else {
        std::memcpy(down, out, n * sizeof(float));
      }
      if (bias_sums) add_to(bias_sums, down, n);
      store(down, at(dbranch, b, s), dbranch.dtype, n);
    }
    store(out, at(dx, b, s), dx.dtype, n);
  }
}

void gated_residual_backward(int64_t n, int64_t b, int64_t begin, int64_t end, Rows dh, Rows branch, Rows gate,
                             Rows dbranch, Rows dgate, float* gate_sums, float* scratch) {
  const Vector gates(gate, b, scratch, n);
  for (int64_t s = begin; s < end; ++s) {
    const float* up = load(at(dh, b, s), dh.dtype, scratch + n, n);
    const float* made = load(at(branch, b, s), branch.dtype, scratch + 2 * n, n);
    vector_gradient(dgate, gate_sums, b, s, made, up, scratch + 3 * n, n);
    const float* value = gates.of(b, s);
    float* down = target(dbranch, b, s, scratch + 3 * n);
    SIMD for (int64_t i = 0; i < n; ++i) down[i] = value[i] * up[i];
    store(down, at(dbranch, b, s), dbranch.dtype, n);
  }
}

}  // namespace
}  // namespace RFKERNELS_ISA
}  // namespace rfkernels
