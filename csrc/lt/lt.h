// Products of linear layers by cuBLASLt, with what follows them as their epilogue. In row-major terms; nothing is copied.
//
// Each returns nothing where cuBLASLt has no algorithm for the tensors, or they do not meet its rules (16-bit or fp32, unit
// stride along rows, the pre-activation's rows a multiple of 8 elements): PyTorch's products and our kernels do it then.
// GELU is its tanh form. Sums are taken in fp32; split products are added in fp32 too, in an order that does not change.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <utility>

namespace rfkernels::lt {

using Pair = std::optional<std::pair<at::Tensor, at::Tensor>>;

// x [M, K], w [N, K], b [N] -> gelu(h), h = x w' + b
Pair linear_gelu(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b);
// dy [M, K], w [K, N], h [M, N] -> dh = (dy w) gelu'(h), the sum of dh over rows
Pair product_gelu_backward(const at::Tensor& dy, const at::Tensor& w, const at::Tensor& h);
// dy [M, N], x [M, K] -> dy' x, the sum of dy over rows
Pair weight_gradient(const at::Tensor& dy, const at::Tensor& x);

// The library to take instead of the one that PyTorch loaded; for tests. Forgets what was found out with another.
void use(const std::string& path);

}  // namespace rfkernels::lt
