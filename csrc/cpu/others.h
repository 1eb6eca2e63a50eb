// The norm of queries and keys, GELU and rectified flow: kernels of kernels.h.
#pragma once

#include "rows.h"

namespace rfkernels {
namespace RFKERNELS_ISA {
namespace {

// --- the norm of queries and keys -------------------------------------------------------------------------------------

inline Rows of_head(Rows rows, int64_t offset) {
  rows.data = static_cast<char*>(rows.data) + offset * bytes(rows.dtype);
  return rows;
}

// The heads of a token follow one another in nearly every layout: then they are read and written as one row.
inline bool together(const Rows& rows, int64_t head, int64_t dim) { return rows.dtype != F32 && head == dim; }

void rms_norm(int64_t b, int64_t begin, int64_t end, int64_t heads, int64_t dim, float eps, Rows x, int64_t head,
              Rows weight, Rows out, float* scratch) {
  const float* w = load(weight.data, weight.dtype, scratch, dim);
  float *const rows = scratch + dim, *const results = rows + heads * dim;
  const bool whole = together(x, head, dim), whole_out = out.dtype != F32;
  for (int64_t s = begin; s < end; ++s) {
    if (whole) load(at(x, b, s), x.dtype, rows, heads * dim);
    for (int64_t k = 0; k < heads; ++k) {
      const float* row = whole ? rows + k * dim : load(at(of_head(x, k * head), b, s), x.dtype, rows, dim);
      float square = 0.f;
      SIMD_SUM(square) for (int64_t i = 0; i < dim; ++i) square += row[i] * row[i];
      const float rstd = 1.f / std::sqrt(square / static_cast<float>(dim) + eps);
      float* made = whole_out ? results + k * dim : static_cast<float*>(at(of_head(out, k * dim), b, s));
      SIMD for (int64_t i = 0; i < dim; ++i) made[i] = row[i] * rstd * w[i];
    }
    if (whole_out) store(results, at(out, b, s), out.dtype, heads * dim);
  }
}

void rms_norm_backward(int64_t b, int64_t begin, int64_t end, int64_t heads, int64_t dim, float eps, Rows dy,
                       int64_t dy_head, Rows x, int64_t head, Rows weight, Rows dx, float* weight_sums,
                       float* scratch) {
  const float* w = load(weight.data, weight.dtype, scratch, dim);
  float *const token_sums = scratch + dim;                 // summed by token first: fewer terms in a row, less rounding
  float *const rows = token_sums + dim, *const ups = rows + heads * dim, *const results = ups + heads * dim;
  const bool whole = together(x, head, dim), whole_up = together(dy, dy_head, dim), whole_out = dx.dtype != F32;
  for (int64_t s = begin; s < end; ++s) {
    std::memset(token_sums, 0, dim * sizeof(float));
    if (whole) load(at(x, b, s), x.dtype, rows, heads * dim);
    if (whole_up) load(at(dy, b, s), dy.dtype, ups, heads * dim);
    for (int64_t k = 0; k < heads; ++k) {
      const float* row = whole ? rows + k * dim : load(at(of_head(x, k * head), b, s), x.dtype, rows, dim);
      const float* up = whole_up ? ups + k * dim : load(at(of_head(dy, k * dy_head), b, s), dy.dtype, ups, dim);
      float square = 0.f, along = 0.f;
      SIMD_SUM(square, along) for (int64_t i = 0; i < dim; ++i) {
        square += row[i] * row[i];
        along += row[i] * up[i] * w[i];
      }
      const float rstd = 1.f / std::sqrt(square / static_cast<float>(dim) + eps);
      const float back = along * rstd * rstd / static_cast<float>(dim);
      float* made = whole_out ? results + k * dim : static_cast<float*>(at(of_head(dx, k * dim), b, s));
      SIMD for (int64_t i = 0; i < dim; ++i) {
        token_sums[i] += up[i] * (row[i] * rstd);
        made[i] = rstd * (up[i] * w[i] - row[i] * back);
      }
    }
    if (whole_out) store(results, at(dx, b, s), dx.dtype, heads * dim);
    SIMD for (int64_t i = 0; i < dim; ++i) weight_sums[i] += token_sums[i];
  }
}

// --- GELU -------------------------------------------------------------------------------------------------------------

// e^x for x <= 88, to 1e-7 of itself: 2^k times a polynomial of the rest. (expf is a call that does not vectorise.)
inline float exponential(float x) {
  const float scaled = x < -87.f ? -87.f * 1.44269504f : x * 1.44269504f;
  const float whole = std::nearbyint(scaled), f = scaled - whole;
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

void gelu_backward(int64_t n, const void* h, const void* da, void* a, void* dh, Dtype dtype, float* sums,
                   float* scratch) {
  const float* x = load(h, dtype, scratch, n);
  const float* up = load(da, dtype, scratch + n, n);
  float* value = !a || dtype != F32 ? scratch + 2 * n : static_cast<float*>(a);
  float* down = dtype != F32 ? scratch + 3 * n : static_cast<float*>(dh);
  // With s = sigmoid(2 u), u = sqrt(2/pi) (h + 0.044715 h^3): gelu = h s, gelu' = s + 2 h s (1 - s) u'
  SIMD for (int64_t i = 0; i < n; ++i) {
    const float near = x[i] < -100.f ? -100.f : x[i] > 100.f ? 100.f : x[i];      // beyond, s is 0 or 1 and its slope 0
    const float square = near * near;
    float z = -1.5957691f * near * (1.f + 0.044715f * square);
    z = z > 87.f ? 87.f : z;
    const float e = exponential(z), s = 1.f / (1.f + e);
    value[i] = x[i] * s;
    down[i] = up[i] * (s + near * s * e * s * (1.5957691f + 0.21406445f * square));
  }
  if (a) store(value, a, dtype, n);
  store(down, dh, dtype, n);
  if (sums) add_to(sums, load(dh, dtype, scratch + 3 * n, n), n);
}

// --- Rectified flow ---------------------------------------------------------------------------------------------------

// z = (1 - t) x0 + t noise, target = noise - x0; or, backward, of dz and dtarget: (1 - t) dz - dtarget, t dz + dtarget.
void flow(int64_t n, float t, const void* first, const void* second, void* left, void* right, Dtype dtype,
          bool backward, float* scratch) {
  const float* a = load(first, dtype, scratch, n);
  const float* b = load(second, dtype, scratch + n, n);
  float* x = dtype == F32 ? static_cast<float*>(left) : scratch + 2 * n;
  float* y = dtype == F32 ? static_cast<float*>(right) : scratch + 3 * n;
  const float rest = 1.f - t;
  if (backward) {
    SIMD for (int64_t i = 0; i < n; ++i) {
      x[i] = rest * a[i] - b[i];
      y[i] = t * a[i] + b[i];
    }
  } else {
    SIMD for (int64_t i = 0; i < n; ++i) {
      x[i] = rest * a[i] + t * b[i];
      y[i] = b[i] - a[i];
    }
  }
  store(x, left, dtype, n);
  store(y, right, dtype, n);
}

double along(int64_t n, const void* dz, const void* x0, const void* noise, Dtype dtype, float* scratch) {
  const float* up = load(dz, dtype, scratch, n);
  const float* a = load(x0, dtype, scratch + n, n);
  const float* b = load(noise, dtype, scratch + 2 * n, n);
  double sum = 0.0;
  SIMD_SUM(sum) for (int64_t i = 0; i < n; ++i) sum += up[i] * (b[i] - a[i]);
  return sum;
}

void add(int64_t n, const void* x, Dtype dtype, const float* added, void* out, Dtype out_dtype, float* scratch) {
  const float* values = load(x, dtype, scratch, n);
  float* made = out_dtype == F32 ? static_cast<float*>(out) : scratch + n;
  SIMD for (int64_t i = 0; i < n; ++i) made[i] = values[i] + added[i];
  store(made, out, out_dtype, n);
}

double squared_error(int64_t n, const void* prediction, Dtype prediction_dtype, const void* target, Dtype target_dtype,
                    float* scratch) {
  const float* a = load(prediction, prediction_dtype, scratch, n);
  const float* b = load(target, target_dtype, scratch + n, n);
  double sum = 0.0;
  SIMD_SUM(sum) for (int64_t i = 0; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

// factor (prediction - target), and its negative into dtarget if that is given.
void error_gradient(int64_t n, float factor, const void* prediction, Dtype prediction_dtype, const void* target,
                    Dtype target_dtype, void* dprediction, void* dtarget, float* scratch) {
  const float* a = load(prediction, prediction_dtype, scratch, n);
  const float* b = load(target, target_dtype, scratch + n, n);
  float* made = prediction_dtype == F32 ? static_cast<float*>(dprediction) : scratch + 2 * n;
  SIMD for (int64_t i = 0; i < n; ++i) made[i] = factor * (a[i] - b[i]);
  store(made, dprediction, prediction_dtype, n);
  if (!dtarget) return;
  float* negative = target_dtype == F32 ? static_cast<float*>(dtarget) : scratch + 3 * n;
  SIMD for (int64_t i = 0; i < n; ++i) negative[i] = -made[i];
  store(negative, dtarget, target_dtype, n);
}

}  // namespace
}  // namespace RFKERNELS_ISA
}  // namespace rfkernels
