// The kernels of csrc/cuda in place of Triton's, where a launch table says that they are faster and they take the tensors.
// Each returns whether it ran. Nothing has to be copied for them: what they do not take is Triton's.
#pragma once

#include "../ops/implementation.h"

namespace rfkernels::launch {

// A vector of the adaLN family, and where its gradient goes: partial sums of it, or one for each token.
struct VectorGradient {
  const Maybe& vector;
  const Tensor& target;
};

// First stage of the adaLN family's backward; without a branch adaln's. bias: partial sums of dbranch, or undefined.
bool cuda_adaln_backward(const Tensor& dy, const Maybe& dh, const Tensor& x, const Maybe& branch,
                         const VectorGradient& shift, const VectorGradient& scale, const VectorGradient& gate,
                         const Tensor& statistics, const Modulated& how, int64_t span, int64_t splits, const Tensor& dx,
                         const Tensor& dbranch, const Tensor& bias);

bool cuda_qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, const Tensor& q_out,
                  const Tensor& k_out, double eps);

// partials: [2, blocks, D] fp32, of the weights' gradients.
bool cuda_qk_norm_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                           const Tensor& q_weight, const Tensor& k_weight, const Tensor& dq, const Tensor& dk,
                           const Tensor& partials, double eps);

// a: gelu(h), or empty; partials: [splits, C] fp32, or empty.
bool cuda_gelu_backward(const Tensor& h, const Tensor& da, const Tensor& a, const Tensor& dh, const Tensor& partials,
                        int64_t span, int64_t splits);

}  // namespace rfkernels::launch
