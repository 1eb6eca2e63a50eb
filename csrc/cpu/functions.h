// Ops that have native code on a CPU only, with their derivatives.
#pragma once

#include "../ops/autograd.h"
#include "kernels.h"

namespace rfkernels::on_cpu {

inline Dtype dtype_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? F32 : t.scalar_type() == at::kBFloat16 ? BF16 : F16;
}

// Where an element lies.
inline char* bytes(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

// (z_t, target) of x0, noise [B, ...] and t [B] fp32, contiguous.
std::tuple<Tensor, Tensor> rectified_flow(const Tensor& x0, const Tensor& noise, const Tensor& t);
// Scalar, fp32; weight [B] fp32.
Tensor weighted_mse(const Tensor& prediction, const Tensor& target, const Tensor& weight);
// latent [B, C, H, W] -> tokens [B, h * w, dim] of that dtype.
Tensor patch_embed(const Tensor& latent, const Tensor& weight, const Maybe& bias, const Tensor& positions, int64_t size,
                   ScalarType);
Tensor patch_unembed(const Tensor& x, const Tensor& weight, const Maybe& bias, int64_t height, int64_t width,
                     int64_t size);
// Joint q of the streams that ask, k and v of all, [B, tokens, H, D], normalised where a stream has weights.
std::tuple<Tensor, Tensor, Tensor> joint_layout(const std::vector<Stream>&, double eps);
// The same without a graph, and the gradients of the streams' tensors, in the order of `flatten`.
std::tuple<Tensor, Tensor, Tensor> join(const std::vector<Stream>&, double eps);
variable_list join_backward(variable_list grads, const std::vector<Stream>&, double eps);

// RMSNorm over D of x [B, S, H, D] into out; of dy into dx, returning the weight's gradient.
void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor& out);
Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps, Tensor& dx);

// Rows [R, C] of a parameter and their states in place, all contiguous; see rfkernels/optim. Scales: of states in codes.
void adamw(const AdamW& how, int64_t first_row, Tensor& weight, const Tensor& gradient, Tensor& first, Tensor& second,
           const Maybe& first_scale, const Maybe& second_scale);

}  // namespace rfkernels::on_cpu
