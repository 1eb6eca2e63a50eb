#include "autograd.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "bias.h"
#include "nodes.h"

namespace rfkernels {

std::function<variable_list(const std::string&, const std::vector<Value>&)> backward_in_python;

bool wants_gradient(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* t : tensors)
    if (t->defined() && t->requires_grad()) return true;
  return false;
}

variable_list once(variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  for (Tensor& gradient : gradients)
    if (gradient.defined()) gradient = gradient.detach().requires_grad_(true);   // or nothing would stand in the way
  const auto count = static_cast<int64_t>(gradients.size());
  return torch::autograd::DelayedError("rfkernels::joint_attention has no second derivative here; use "
                                       "rfkernels.backend('reference')", count)
      .apply(std::move(gradients));
}

bool plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet wrapped({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::FuncTorchBatched,
                                         DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched,
                                         DispatchKey::Functionalize, DispatchKey::ZeroTensor, DispatchKey::Negative,
                                         DispatchKey::Conjugate});
  return !t.key_set().has_any(wrapped) && t.layout() == at::kStrided && (t.is_cpu() || t.is_cuda());
}

bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::jit::tracer::isTracing();
}

namespace {

// --- the adaLN family -------------------------------------------------------------------------------------------------

struct AdalnFunction : Function<AdalnFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& shift, const Maybe& scale,
                        const Call& call) {
    auto [y, statistics] = call.implementation->adaln(x, shift, scale, call.how, call.first);
    ctx->save_for_backward({x, value(shift), value(scale), statistics});
    ctx->set_materialize_grads(false);
    call.keep(ctx);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &shift = saved[1], &scale = saved[2], &statistics = saved[3];
    if (!here(grads))
      return given(backward_in_python(call.op("adaln"), {grads[0], x, shift, scale, statistics, call.how.plus_one,
                                                         call.norm(), call.how.eps}),
                   {true, shift.defined(), scale.defined()}, 4);
    auto [dx, dshift, dscale] =
        call.implementation->adaln_backward(grads[0], x, maybe(shift), maybe(scale), statistics, call.how, true);
    return {dx, dshift, dscale, Tensor()};
  }
};

struct GatedAdalnFunction : Function<GatedAdalnFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& residual, const Tensor& branch, const Maybe& gate,
                               const Maybe& shift, const Maybe& scale, Call call, ScalarType h_type) {
    auto [h, y, statistics] =
        call.implementation->gated_adaln(residual, branch, gate, shift, scale, call.how, h_type, call.second);
    ctx->save_for_backward({h, branch, value(gate), value(shift), value(scale), statistics});
    ctx->set_materialize_grads(false);
    call.first = residual.scalar_type();
    call.keep(ctx);
    return {h, y};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(7);
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &h = saved[0], &branch = saved[1], &gate = saved[2], &shift = saved[3], &scale = saved[4];
    const Tensor dh = or_zeros(grads[0], h, h.scalar_type()), dy = or_zeros(grads[1], h, call.second);
    if (!here(grads))
      return given(backward_in_python(call.op("gated_adaln"),
                                      {dh, dy, h, branch, gate, shift, scale, saved[5], call.how.plus_one, call.norm(),
                                       call.how.eps, call.first, false}),
                   {true, true, gate.defined(), shift.defined(), scale.defined()}, 7);
    auto made = call.implementation->gated_adaln_backward(dh, dy, h, branch, maybe(gate), maybe(shift), maybe(scale),
                                                          saved[5], call.how, call.first, call.bias, true);
    if (made.bias.defined()) give_sums(made.branch, made.bias);
    return {made.residual, made.branch, made.gate, made.shift, made.scale, Tensor(), Tensor()};
  }
};

struct GatedResidualFunction : Function<GatedResidualFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& residual, const Tensor& branch, const Maybe& gate,
                        Call call, ScalarType type) {
    ctx->save_for_backward({gate ? branch : Tensor(), value(gate)});
    call.first = residual.scalar_type();
    call.second = branch.scalar_type();
    call.keep(ctx);
    return call.implementation->gated_residual(residual, branch, gate, type);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &dh = grads[0], &branch = saved[0], &gate = saved[1];
    const Tensor dresidual = dh.to(call.first);              // dh itself, most often: no copy
    if (!gate.defined()) return {dresidual, dh.to(call.second), Tensor(), Tensor(), Tensor()};
    if (!here(grads)) {
      auto made = backward_in_python(call.op("gated_residual"), {dh, branch, gate});
      return {dresidual, made[0], made[1], Tensor(), Tensor()};
    }
    auto [dbranch, dgate] = call.implementation->gated_residual_backward(dh, branch, gate, true);
    return {dresidual, dbranch, dgate, Tensor(), Tensor()};
  }
};

// --- the norm of queries and keys -------------------------------------------------------------------------------------

struct QkNormFunction : Function<QkNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& q_weight,
                               const Tensor& k_weight, const Call& call) {
    ctx->save_for_backward({q, k, q_weight, k_weight});
    call.keep(ctx);
    auto [normal_q, normal_k] = call.implementation->qk_norm(q, k, q_weight, k_weight, call.how.eps);
    return {normal_q, normal_k};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    if (!here(grads)) {
      auto made = backward_in_python(call.op("qk_norm"), {grads[0], grads[1], saved[0], saved[1], saved[2], saved[3],
                                                          call.how.eps});
      made.resize(5);
      return made;
    }
    auto [dq, dk, dq_weight, dk_weight] = call.implementation->qk_norm_backward(
        grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], call.how.eps);
    return {dq, dk, dq_weight, dk_weight, Tensor()};
  }
};

}  // namespace

Tensor adaln(const Implementation& by, const Tensor& x, const Maybe& shift, const Maybe& scale, const Modulated& how,
             ScalarType type) {
  const bool graph = at::GradMode::is_enabled() && (x.requires_grad() || differentiable(shift) || differentiable(scale));
  if (!graph) return std::get<0>(by.adaln(x, shift, scale, how, type));
  Call call(by, how);
  call.first = type;
  return AdalnFunction::apply(x, shift, scale, call);
}

std::tuple<Tensor, Tensor> gated_adaln(const Implementation& by, const Tensor& residual, const Tensor& branch,
                                       const Maybe& gate, const Maybe& shift, const Maybe& scale, const Modulated& how,
                                       ScalarType y, bool bias) {
  const ScalarType h = promoted(residual, branch, gate);
  const bool graph = at::GradMode::is_enabled() && (residual.requires_grad() || branch.requires_grad() ||
                                                    differentiable(gate) || differentiable(shift) || differentiable(scale));
  if (!graph) {
    auto made = by.gated_adaln(residual, branch, gate, shift, scale, how, h, y);
    return {std::get<0>(made), std::get<1>(made)};
  }
  Call call(by, how);
  call.second = y;
  call.bias = bias;
  auto made = GatedAdalnFunction::apply(residual, branch, gate, shift, scale, call, h);
  return {made[0], made[1]};
}

Tensor gated_residual(const Implementation& by, const Tensor& residual, const Tensor& branch, const Maybe& gate) {
  const ScalarType type = promoted(residual, branch, gate);
  if (!at::GradMode::is_enabled() || !(residual.requires_grad() || branch.requires_grad() || differentiable(gate)))
    return by.gated_residual(residual, branch, gate, type);
  return GatedResidualFunction::apply(residual, branch, gate, Call(by, {}), type);
}

std::tuple<Tensor, Tensor> qk_norm(const Implementation& by, const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                   const Tensor& k_weight, double eps) {
  if (!wants_gradient({&q, &k, &q_weight, &k_weight})) return by.qk_norm(q, k, q_weight, k_weight, eps);
  auto made = QkNormFunction::apply(q, k, q_weight, k_weight, Call(by, {true, true, eps}));
  return {made[0], made[1]};
}

}  // namespace rfkernels
