// The chunks of a modulation [B, n * C], whose gradients the ops write straight into one tensor; the counterpart of
// rfkernels/adaln/chunks.py.
#pragma once

#include <torch/csrc/autograd/variable.h>

namespace rfkernels {

// modulation [B, count * C] or [B, 1, count * C], contiguous -> count views of it.
torch::autograd::variable_list chunk_modulation(const at::Tensor& modulation, int64_t count);

// An uninitialised gradient for a modulation vector: a part of its modulation's if it is a chunk of one.
at::Tensor gradient_of(const at::Tensor& vector, bool in_chunks);

}  // namespace rfkernels
