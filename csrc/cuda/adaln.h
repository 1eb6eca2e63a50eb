// Backward of the adaLN family, first stage; the second, which adds partial sums in a fixed order, is Triton's
// sum_partials (rfkernels/adaln/kernels.py).
//
// A block owns `span` tokens of one sample and walks over them, the whole width of a token at a time: each thread holds
// eight channels (of a width that is no template, every THREADS-th eight). Sums of the gradients of vectors that tokens
// share stay in registers and leave as one row of partials; those of per-token vectors leave with their token.
#pragma once

#include "device.h"

namespace rfkernels::cuda {

template <bool EXACT>
DEVICE void stored(const Vector& v, int64_t token, int32_t channels, int first, int count, const float (&value)[kVector]) {
  if (v.way == kStored) store8<EXACT>(v.kind, v.gradient, token * channels + first, count, value);
}

// THREADS: of a block, each with eight channels. CHANNELS: 0 for any width up to 8 * THREADS, without 16-byte accesses.
template <int KIND, int CHANNELS, int THREADS, bool GATED>
DEVICE void adaln_backward(const AdalnBackward& a) {
  constexpr bool EXACT = CHANNELS > 0;
  constexpr int WARPS = THREADS / 32;
  SHARED(float, room, 4 * WARPS);
  const int32_t channels = EXACT ? CHANNELS : a.channels;
  const int first = static_cast<int>(threadIdx.x) * kVector;
  const int count = channels - first < kVector ? (channels > first ? channels - first : 0) : kVector;
  const bool active = count > 0;
  const int64_t b = blockIdx.x, split = blockIdx.y, begin = split * a.span;
  const int64_t end = begin + a.span < a.length ? begin + a.span : a.length;
  const float share = 1.f / static_cast<float>(channels);
  float factor[kVector], gate[kVector], shift_sums[kVector], scale_sums[kVector], gate_sums[kVector], bias_sums[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    factor[k] = gate[k] = 1.f;
    shift_sums[k] = scale_sums[k] = gate_sums[k] = bias_sums[k] = 0.f;
  }
  for (int64_t s = begin; s < end; ++s) {
    const int64_t token = b * a.length + s;
    const float mean = a.mean[token], rstd = a.rstd[token];
    float up[kVector], hat[kVector], drift = 0.f, along = 0.f;
    if (active) {
      // A vector that tokens share is read once.
      if (a.scale.rows.data && (s == begin || a.scale.rows.token)) {
        load8<EXACT>(a.scale.kind, a.scale.rows.data, b * a.scale.rows.batch + s * a.scale.rows.token + first, count, factor);
#pragma unroll
        for (int k = 0; k < kVector; ++k) factor[k] += a.one;
      }
      load8<KIND, EXACT>(a.dy.data, b * a.dy.batch + s * a.dy.token + first, count, up);
      load8<KIND, EXACT>(a.x.data, b * a.x.batch + s * a.x.token + first, count, hat);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        hat[k] = k < count ? (hat[k] - mean) * rstd : 0.f;
        const float g = up[k] * factor[k];
        drift += g;
        along += g * hat[k];
        shift_sums[k] += up[k];
        scale_sums[k] += up[k] * hat[k];
      }
      stored<EXACT>(a.shift, token, channels, first, count, up);
      if (a.scale.way == kStored) {
        float product[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) product[k] = up[k] * hat[k];
        stored<EXACT>(a.scale, token, channels, first, count, product);
      }
    }
    block_sums<WARPS>(drift, along, room, static_cast<int>(s - begin));
    drift = a.rms ? 0.f : drift * share;
    along *= share;
    if (!active) continue;
    float down[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) down[k] = (up[k] * factor[k] - drift - hat[k] * along) * rstd;
    if (GATED) {
      float more[kVector];
      load8<KIND, EXACT>(a.dh.data, b * a.dh.batch + s * a.dh.token + first, count, more);
#pragma unroll
      for (int k = 0; k < kVector; ++k) down[k] += more[k];
      if (a.gate.rows.data) {
        if (s == begin || a.gate.rows.token)
          load8<EXACT>(a.gate.kind, a.gate.rows.data, b * a.gate.rows.batch + s * a.gate.rows.token + first, count, gate);
        load8<KIND, EXACT>(a.branch.data, b * a.branch.batch + s * a.branch.token + first, count, more);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          more[k] *= down[k];
          gate_sums[k] += more[k];
        }
        stored<EXACT>(a.gate, token, channels, first, count, more);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        more[k] = gate[k] * down[k];
        bias_sums[k] += more[k];
      }
      store8<KIND, EXACT>(a.dbranch, token * channels + first, count, more);
    }
    store8<KIND, EXACT>(a.dx, token * channels + first, count, down);
  }
  if (!active) return;
  const int64_t row = (b * gridDim.y + split) * channels + first;
  if (a.shift.way == kSummed) store8<kF32, EXACT>(a.shift.gradient, row, count, shift_sums);
  if (a.scale.way == kSummed) store8<kF32, EXACT>(a.scale.gradient, row, count, scale_sums);
  if (GATED && a.gate.way == kSummed) store8<kF32, EXACT>(a.gate.gradient, row, count, gate_sums);
  if (GATED && a.bias) store8<kF32, EXACT>(a.bias, row, count, bias_sums);
}

}  // namespace rfkernels::cuda
