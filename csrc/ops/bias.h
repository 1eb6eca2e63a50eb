// Sums of a gradient over its tokens, handed from the op that makes it to the layer whose bias has them as its gradient;
// the counterpart of rfkernels/bias.py. Valid while the gradient is what it was: autograd may have added to it.
#pragma once

#include <ATen/ATen.h>

namespace rfkernels {

void give_sums(const at::Tensor& gradient, const at::Tensor& sums);
at::Tensor take_sums(const at::Tensor& gradient);  // undefined if there are none

}  // namespace rfkernels
