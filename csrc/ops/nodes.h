// What the autograd nodes of this folder share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"

namespace rfkernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;

inline Tensor value(const Maybe& t) { return t ? *t : Tensor(); }
inline Maybe maybe(const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); }

inline bool differentiable(const Maybe& t) { return t && t->requires_grad(); }

// What an op's backward needs to know besides its tensors.
struct Call {
  const Implementation* implementation;
  Modulated how;
  ScalarType first = at::kFloat, second = at::kFloat;
  bool bias = false;

  void keep(AutogradContext* ctx) const {
    ctx->saved_data["how"] = static_cast<int64_t>(how.plus_one) | how.rms << 1 | bias << 2 |
                             (implementation == &cpu() ? 1 : 0) << 3 | static_cast<int64_t>(first) << 8 |
                             static_cast<int64_t>(second) << 16;
    ctx->saved_data["eps"] = how.eps;
  }
  explicit Call(AutogradContext* ctx) {
    const int64_t bits = ctx->saved_data["how"].toInt();
    how = {(bits & 1) != 0, (bits & 2) != 0, ctx->saved_data["eps"].toDouble()};
    bias = (bits & 4) != 0;
    implementation = bits & 8 ? &cpu() : &launched();
    first = static_cast<ScalarType>(bits >> 8 & 255);
    second = static_cast<ScalarType>(bits >> 16 & 255);
  }
  Call(const Implementation& one, const Modulated& settings) : implementation(&one), how(settings) {}

  std::string op(const char* name) const { return std::string(name) + implementation->suffix(); }
  std::string norm() const { return how.rms ? "rms" : "layer"; }
};

// Whether a backward may run here, or has to be seen by Python.
inline bool here(const variable_list& grads) {
  if (at::GradMode::is_enabled() || watched()) return false;
  for (const Tensor& grad : grads)
    if (grad.defined() && !plain(grad)) return false;
  return true;
}

// Gradients from Python, of those inputs that were given.
inline variable_list given(variable_list made, std::initializer_list<bool> wanted, size_t count) {
  made.resize(wanted.size());
  size_t i = 0;
  for (const bool one : wanted) {
    if (!one) made[i] = Tensor();
    ++i;
  }
  made.resize(count);
  return made;
}

inline Tensor or_zeros(const Tensor& grad, const Tensor& like, ScalarType type) {
  return grad.defined() ? grad : at::zeros(like.sizes(), like.options().dtype(type));
}

}  // namespace rfkernels
