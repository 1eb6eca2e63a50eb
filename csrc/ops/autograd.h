// The ops with their derivatives: what plain eager mode calls. Compilers, modes and transforms see the registered
// operators (rfkernels/registration.py), which have the same schemas and the same code below autograd.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <functional>
#include <variant>

#include "implementation.h"

namespace rfkernels {

using torch::autograd::variable_list;

Tensor adaln(const Implementation&, const Tensor& x, const Maybe& shift, const Maybe& scale, const Modulated&,
             ScalarType);
// (h, y). bias: the layer that made branch takes the sum of its gradient (bias.h).
std::tuple<Tensor, Tensor> gated_adaln(const Implementation&, const Tensor& residual, const Tensor& branch,
                                       const Maybe& gate, const Maybe& shift, const Maybe& scale, const Modulated&,
                                       ScalarType y, bool bias);
Tensor gated_residual(const Implementation&, const Tensor& residual, const Tensor& branch, const Maybe& gate);
std::tuple<Tensor, Tensor> qk_norm(const Implementation&, const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                   const Tensor& k_weight, double eps);
// F.linear with the last dimension unflattened to shape, if any is given; takes the sums for bias that come with the
// gradient of its output.
Tensor linear(const Implementation&, const Tensor& x, const Tensor& weight, const Maybe& bias, at::IntArrayRef shape);
Tensor gelu_mlp(const Implementation&, const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2,
                const Maybe& b2);
std::vector<Tensor> joint_attention(const Implementation&, const std::vector<Stream>&, double scale, double eps,
                                    bool bias);

bool wants_gradient(std::initializer_list<const Tensor*>);

// Gradients of joint_attention, of which a second derivative raises, by name, if a graph of them is wanted.
variable_list once(variable_list gradients);

// Whether a tensor is a plain one: no wrapper of a transform, no subclass, its memory here.
bool plain(const Tensor&);
// Whether something wants to see operators: a dispatch mode, a function transform, forward mode.
bool watched();

// Runs an op's backward in Python, by name, where a graph of gradients is wanted or somebody watches. Set by python.cpp.
using Value = std::variant<Tensor, int64_t, double, bool, std::string, ScalarType>;
extern std::function<variable_list(const std::string& op, const std::vector<Value>&)> backward_in_python;

}  // namespace rfkernels
