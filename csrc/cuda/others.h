// The norm of queries and keys both ways, and the backward of tanh-GELU.
#pragma once

#include "adaln.h"

namespace rfkernels::cuda {

DEVICE int64_t place(const Heads& x, int64_t row, int32_t length, int32_t heads) {
  return row / heads / length * x.batch + row / heads % length * x.token + row % heads * x.head;
}

// LANES threads share a row, each with eight of its D channels.
template <int LANES>
DEVICE float row_sum(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) value += from_lane_xor(value, mask);
  return value;
}

template <int KIND, int DIM, int LANES, int THREADS>
DEVICE void qk_norm_forward(const QkNorm& a) {
  constexpr bool EXACT = DIM > 0;
  constexpr int ROWS = THREADS / LANES;
  const int32_t dim = EXACT ? DIM : a.dim;
  const int first = static_cast<int>(threadIdx.x) % LANES * kVector;
  const int count = dim - first < kVector ? (dim > first ? dim - first : 0) : kVector;
  float weight[kVector] = {};
  load8<EXACT>(a.weight_kind, a.weight, first, count, weight);
  for (int64_t group = blockIdx.x; group * ROWS < a.rows; group += gridDim.x) {
    const int64_t row = group * ROWS + static_cast<int>(threadIdx.x) / LANES;
    const bool live = row < a.rows && count > 0;
    float x[kVector] = {}, square = 0.f;
    if (live) load8<KIND, EXACT>(a.x.data, place(a.x, row, a.length, a.heads) + first, count, x);
#pragma unroll
    for (int k = 0; k < kVector; ++k) square += x[k] * x[k];
    const float rstd = 1.f / sqrt_of(row_sum<LANES>(square) / static_cast<float>(dim) + a.eps);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] *= rstd * weight[k];
    if (live) store8<KIND, EXACT>(a.out, row * dim + first, count, x);
  }
}

template <int KIND, int DIM, int LANES, int THREADS>
DEVICE void qk_norm_backward(const QkNorm& a) {
  constexpr bool EXACT = DIM > 0;
  constexpr int ROWS = THREADS / LANES;
  SHARED(float, sums, ROWS * LANES * kVector);
  const int32_t dim = EXACT ? DIM : a.dim;
  const int lane = static_cast<int>(threadIdx.x) % LANES, mine = static_cast<int>(threadIdx.x) / LANES;
  const int first = lane * kVector, count = dim - first < kVector ? (dim > first ? dim - first : 0) : kVector;
  float weight[kVector] = {}, total[kVector] = {};
  load8<EXACT>(a.weight_kind, a.weight, first, count, weight);
  for (int64_t group = blockIdx.x; group * ROWS < a.rows; group += gridDim.x) {
    const int64_t row = group * ROWS + mine;
    const bool live = row < a.rows && count > 0;
    float x[kVector] = {}, up[kVector] = {}, square = 0.f, along = 0.f;
    if (live) {
      load8<KIND, EXACT>(a.x.data, place(a.x, row, a.length, a.heads) + first, count, x);
      load8<KIND, EXACT>(a.dy.data, place(a.dy, row, a.length, a.heads) + first, count, up);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      square += x[k] * x[k];
      along += x[k] * up[k] * weight[k];
    }
    const float rstd = 1.f / sqrt_of(row_sum<LANES>(square) / static_cast<float>(dim) + a.eps);
    const float back = row_sum<LANES>(along) * rstd * rstd / static_cast<float>(dim);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      total[k] += up[k] * (x[k] * rstd);
      x[k] = rstd * (up[k] * weight[k] - x[k] * back);
    }
    if (live) store8<KIND, EXACT>(a.dx, row * dim + first, count, x);
  }
  // The block's rows, added in their order.
  for (int k = 0; k < kVector; ++k) sums[(mine * LANES + lane) * kVector + k] = total[k];
  barrier();
  for (int column = static_cast<int>(threadIdx.x); column < dim; column += THREADS) {
    float sum = 0.f;
    for (int r = 0; r < ROWS; ++r) sum += sums[r * LANES * kVector + column];
    a.partials[static_cast<int64_t>(blockIdx.x) * dim + column] = sum;
  }
}

// A block walks over `span` rows of 8 * THREADS columns.
template <int KIND, bool EXACT, int THREADS>
DEVICE void gelu_backward(const GeluBackward& g) {
  const int first = (static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x)) * kVector;
  const int count = g.channels - first < kVector ? g.channels - first : kVector;
  if (count <= 0) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * g.span;
  const int64_t end = begin + g.span < g.rows ? begin + g.span : g.rows;
  float sums[kVector] = {};
#pragma unroll 2
  for (int64_t row = begin; row < end; ++row) {
    const int64_t here = row * g.channels + first;
    float h[kVector], up[kVector];
    load8<KIND, EXACT>(g.h, here, count, h);
    load8<KIND, EXACT>(g.da, here, count, up);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      // With s = sigmoid(2 u), u = sqrt(2/pi) (h + 0.044715 h^3): gelu = h s, gelu' = s + 2 h s (1 - s) u'
      const float square = h[k] * h[k], z = -2.3022082f * h[k] * (1.f + 0.044715f * square);
      const float e = exp2_of(z < 126.f ? z : 126.f), s = 1.f / (1.f + e);
      h[k] *= s;
      up[k] *= s + h[k] * e * s * (1.5957691f + 0.21406445f * square);
    }
    if (g.a) store8<KIND, EXACT>(g.a, here, count, h);
    store8<KIND, EXACT>(g.dh, here, count, up);
    if (g.partials) {
      load8<KIND, EXACT>(g.dh, here, count, up);          // as the product reads it
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k] += up[k];
    }
  }
  if (g.partials) store8<kF32, EXACT>(g.partials, static_cast<int64_t>(blockIdx.y) * g.channels + first, count, sums);
}

}  // namespace rfkernels::cuda
