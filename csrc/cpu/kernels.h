// Kernels on rows of channels, for one range of rows: no threads, no allocation, no PyTorch in here.
//
// Every tensor has a dtype of its own; arithmetic is fp32. A modulation vector that is not given is a null pointer.
// This file is included by kernels.cpp, which is compiled once for each instruction set, and by what calls it.
#pragma once

#include <cstdint>

namespace rfkernels {

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

// Rows [B, S, C] or a modulation vector for them: element (b, s, c) is at data + (b * batch + s * token + c).
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, token = 0;
  Dtype dtype = F32;
};

// How tokens [begin, end) of one sample are normalised and modulated: y = norm(x) * (one + scale) + shift.
struct Norm {
  int64_t channels;
  bool rms;
  float one, eps;
};

enum States : int { FULL = 0, HALF = 1, EIGHT = 2 };  // of AdamW: fp32, bf16, codes of 8 bits

constexpr int64_t kScaled = 256;  // elements of a row whose codes share a scale: BLOCK of rfkernels/optim/reference.py

// A step of AdamW (rfkernels/optim/reference.py): rest is 1 - beta, first and second 1 - beta^step, decay
// 1 - lr * weight_decay, key the hash of step and seed.
struct AdamW {
  float lr, beta1, beta2, rest1, rest2, first, second, eps, decay, grad_scale;
  bool scaled;
  uint32_t key;
};

// One instruction set's kernels. mean and rstd: of this sample's tokens, [S]. partials: this range's sums, C fp32 each.
struct Kernels {
  const char* name;
  void (*adaln)(Norm, int64_t b, int64_t begin, int64_t end, Rows x, Rows shift, Rows scale, Rows y, float* mean,
                float* rstd, float* scratch);
  void (*gated_adaln)(Norm, int64_t b, int64_t begin, int64_t end, Rows residual, Rows branch, Rows gate, Rows shift,
                      Rows scale, Rows h, Rows y, float* mean, float* rstd, float* scratch);
  void (*gated_residual)(int64_t channels, int64_t b, int64_t begin, int64_t end, Rows residual, Rows branch, Rows gate,
                         Rows h, float* scratch);
  // dh, branch and gate are null without a gate; dshift, dscale, dgate: where a gradient per token goes, else null.
  void (*adaln_backward)(Norm, int64_t b, int64_t begin, int64_t end, Rows dy, Rows dh, Rows x, Rows branch, Rows gate,
                         Rows scale, const float* mean, const float* rstd, Rows dx, Rows dbranch, Rows dshift,
                         Rows dscale, Rows dgate, float* shift_sums, float* scale_sums, float* gate_sums,
                         float* bias_sums, float* scratch);
  void (*gated_residual_backward)(int64_t channels, int64_t b, int64_t begin, int64_t end, Rows dh, Rows branch,
                                  Rows gate, Rows dbranch, Rows dgate, float* gate_sums, float* scratch);
  // Rows of D: heads of tokens. x at x + row offsets, computed by the caller's strides.
  void (*rms_norm)(int64_t b, int64_t begin, int64_t end, int64_t heads, int64_t dim, float eps, Rows x, int64_t head,
                   Rows weight, Rows out, float* scratch);
  void (*rms_norm_backward)(int64_t b, int64_t begin, int64_t end, int64_t heads, int64_t dim, float eps, Rows dy,
                            int64_t dy_head, Rows x, int64_t head, Rows weight, Rows dx, float* weight_sums,
                            float* scratch);
  // n elements: dh = da gelu'(h), a = gelu(h) if given; adds dh, as stored, to sums of its columns if given.
  void (*gelu_backward)(int64_t n, const void* h, const void* da, void* a, void* dh, Dtype, float* sums,
                        float* scratch);
  // n elements of a sample: noising and target at time t, or the gradients of x0 and noise from theirs.
  void (*flow)(int64_t n, float t, const void* first, const void* second, void* left, void* right, Dtype, bool backward,
               float* scratch);
  double (*squared_error)(int64_t n, const void* prediction, Dtype, const void* target, Dtype, float* scratch);
  void (*error_gradient)(int64_t n, float factor, const void* prediction, Dtype, const void* target, Dtype,
                         void* dprediction, void* dtarget, float* scratch);
  // The sum of dz (noise - x0).
  double (*along)(int64_t n, const void* dz, const void* x0, const void* noise, Dtype, float* scratch);
  // out = x + added
  void (*add)(int64_t n, const void* x, Dtype, const float* added, void* out, Dtype, float* scratch);
  // Up to 256 elements of a row of a parameter, from a column on; their two scales, of codes.
  void (*adamw)(const AdamW&, uint32_t row, int64_t column, int64_t n, void* weight, Dtype, const void* gradient, Dtype,
                void* first, void* second, float* first_scale, float* second_scale, States);
};

constexpr int64_t kScratchRows = 6;  // of C fp32, that a kernel may use

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace rfkernels
