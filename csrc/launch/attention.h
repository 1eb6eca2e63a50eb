// Launches of joint attention's kernels: what rfkernels/joint_attention/launch.py does.
//
// Of streams that either all have the norm's weights or none, without a rotary embedding; others are prepared first, which
// is Python's.
#pragma once

#include "../ops/implementation.h"

namespace rfkernels::launch {

// Why these streams are not for here, or null.
const char* refuses(const std::vector<Stream>&);

Attention attention(const std::vector<Stream>&, double scale, double eps);
// grads: one for each stream that asks. bias: also the sums of the packed streams' gradients.
std::vector<StreamGradients> attention_backward(const std::vector<Tensor>& grads, const Attention&,
                                                const std::vector<Stream>&, double scale, double eps, bool bias);

}  // namespace rfkernels::launch
