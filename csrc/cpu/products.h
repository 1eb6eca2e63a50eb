// Matrix products of fp32 on a CPU. PyTorch's are MKL's, which on AMD's CPUs run at half of what oneDNN's do: measured on
// an EPYC (Zen 4), one thread, 16 to 6144 columns: 88 to 103 against 152 to 239 GFLOP/s. oneDNN is what PyTorch's own
// convolutions and 16-bit products take; `mkldnn::_linear_pointwise` is its operator for them.
#pragma once

#include <ATen/ATen.h>

namespace rfkernels::products {

// x [..., K] times weight [N, K] transposed, plus bias [N]; gelu: its tanh form of the result.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  bool gelu = false);
// a [M, K] b [K, N]
at::Tensor mm(const at::Tensor& a, const at::Tensor& b);

}  // namespace rfkernels::products
