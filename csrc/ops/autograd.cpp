#include "autograd.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "../cpu/products.h"
#include "bias.h"
#include "streams.h"

namespace rfkernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;

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

Tensor value(const Maybe& t) { return t ? *t : Tensor(); }
Maybe maybe(const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); }

bool differentiable(const Maybe& t) { return t && t->requires_grad(); }

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
bool here(const variable_list& grads) {
  if (at::GradMode::is_enabled() || watched()) return false;
  for (const Tensor& grad : grads)
    if (grad.defined() && !plain(grad)) return false;
  return true;
}

// Gradients from Python, of those inputs that were given.
variable_list given(variable_list made, std::initializer_list<bool> wanted, size_t count) {
  made.resize(wanted.size());
  size_t i = 0;
  for (const bool one : wanted) {
    if (!one) made[i] = Tensor();
    ++i;
  }
  made.resize(count);
  return made;
}

Tensor or_zeros(const Tensor& grad, const Tensor& like, ScalarType type) {
  return grad.defined() ? grad : at::zeros(like.sizes(), like.options().dtype(type));
}

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

// --- linear layers ----------------------------------------------------------------------------------------------------

Tensor rows_of(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

// By PyTorch's own operator where a graph is wanted or somebody watches.
Tensor product(const Tensor& a, const Tensor& b) {
  return at::GradMode::is_enabled() || watched() || !plain(a) || !plain(b) ? at::mm(a, b) : products::mm(a, b);
}

Tensor bias_gradient(const Tensor& gradient, const Tensor& rows) {
  const Tensor sums = at::GradMode::is_enabled() ? Tensor() : take_sums(gradient);
  return sums.defined() ? sums.view({-1}) : rows.sum(0);
}

struct LinearFunction : Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias,
                        at::IntArrayRef shape) {
    ctx->save_for_backward({weight.requires_grad() ? x : Tensor(), weight});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["shape"] = x.sizes();
    const Tensor out = products::linear(x, weight, bias);
    return shape.empty() ? out : out.unflatten(-1, shape);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor rows = grads[0].reshape({-1, weight.size(0)});
    variable_list made(4);
    if (ctx->needs_input_grad(0)) made[0] = product(rows, weight).view(ctx->saved_data["shape"].toIntVector());
    if (ctx->needs_input_grad(1)) made[1] = product(rows.t(), rows_of(x));
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) made[2] = bias_gradient(grads[0], rows);
    return made;
  }
};

struct GeluMlpFunction : Function<GeluMlpFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2,
                        const Maybe& b2, const Call& call) {
    const Tensor h = products::linear(x, w1, b1);
    ctx->save_for_backward({x, w1, h, w2, value(b1)});
    ctx->saved_data["bias"] = b2.has_value();
    call.keep(ctx);
    return products::linear(at::gelu(h, "tanh"), w2, b2);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w1 = saved[1], &h = saved[2], &w2 = saved[3], &b1 = saved[4], &dy = grads[0];
    const bool second = ctx->saved_data["bias"].toBool();
    // Edges are those of the tensors that were given.
    size_t edge = 0;
    const auto next = [&](bool is_given) { return is_given && ctx->needs_input_grad(edge++); };
    const bool dx = next(true), dw1 = next(true), db1 = next(b1.defined()), dw2 = next(true), db2 = next(second);
    if (!here(grads)) {
      const Tensor b2 = db2 ? at::zeros({dy.size(-1)}, dy.options()) : Tensor();
      auto made = backward_in_python("gelu_mlp", {x, w1, b1, w2, b2, dy});
      return given(std::move(made), {true, true, b1.defined(), true, second}, 6);
    }
    variable_list made(6);
    const Tensor rows = rows_of(dy);
    if (dx || dw1 || db1 || dw2) {
      auto [a, dh, sums] = call.implementation->gelu_backward(rows_of(h), product(rows, w2), dw2, db1);
      if (dx) made[0] = product(dh, w1).view(x.sizes());
      if (dw1) made[1] = product(dh.t(), rows_of(x));
      if (db1) made[2] = sums;
      if (dw2) made[3] = product(rows.t(), a);
    }
    if (db2) made[4] = bias_gradient(dy, rows);
    return made;
  }
};

// --- joint attention --------------------------------------------------------------------------------------------------

struct AttentionFunction : Function<AttentionFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, int64_t codes, int64_t count, double scale,
                               const Call& call) {
    const auto streams = parse(tensors, codes, count);
    Attention made = call.implementation->joint_attention(streams, scale, call.how.eps);
    variable_list kept = tensors.vec();
    kept.insert(kept.end(), made.outs.begin(), made.outs.end());
    kept.push_back(made.lse);
    kept.push_back(made.rstd);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["codes"] = codes;
    ctx->saved_data["count"] = count;
    ctx->saved_data["scale"] = scale;
    call.keep(ctx);
    return made.outs;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Call call(ctx);
    const auto saved = ctx->get_saved_variables();
    const auto streams = parse(saved, ctx->saved_data["codes"].toInt(), ctx->saved_data["count"].toInt());
    for (const Tensor& grad : grads)
      TORCH_CHECK_NOT_IMPLEMENTED(plain(grad), "joint_attention takes no batched gradients here; use"
                                  " rfkernels.backend('reference')");
    Attention made;
    made.outs.assign(saved.end() - 2 - static_cast<std::ptrdiff_t>(grads.size()), saved.end() - 2);
    made.lse = saved[saved.size() - 2];
    made.rstd = saved.back();
    variable_list gradients;
    {
      const at::NoGradGuard no_graph;
      const bool bias = call.bias && !at::GradMode::is_enabled();
      auto found = call.implementation->joint_attention_backward(grads, made, streams,
                                                                 ctx->saved_data["scale"].toDouble(), call.how.eps, bias);
      for (size_t i = 0; i < streams.size(); ++i) {
        append(gradients, streams[i], found[i]);
        if (found[i].bias.defined()) give_sums(found[i].packed, found[i].bias);
      }
    }
    const size_t tensors = gradients.size();
    gradients = once(std::move(gradients));
    gradients.resize(tensors + 4);
    return gradients;
  }
};

}  // namespace

std::vector<Tensor> joint_attention(const Implementation& by, const std::vector<Stream>& streams, double scale,
                                    double eps, bool bias) {
  const Flat flat = flatten(streams);
  bool graph = false;
  for (const Tensor& t : flat.tensors) graph |= t.requires_grad();
  if (!graph || !at::GradMode::is_enabled()) return by.joint_attention(streams, scale, eps).outs;
  Call call(by, {true, true, eps});
  call.bias = bias;
  return AttentionFunction::apply(at::TensorList(flat.tensors), flat.codes, flat.count, scale, call);
}

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

Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias, at::IntArrayRef shape) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || differentiable(bias)))
    return LinearFunction::apply(x, weight, bias, shape);
  const Tensor out = products::linear(x, weight, bias);
  return shape.empty() ? out : out.unflatten(-1, shape);
}

Tensor gelu_mlp(const Implementation& by, const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2,
                const Maybe& b2) {
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || w1.requires_grad() || differentiable(b1) ||
                                       w2.requires_grad() || differentiable(b2)))
    return products::linear(products::linear(x, w1, b1, true), w2, b2);
  return GeluMlpFunction::apply(x, w1, b1, w2, b2, Call(by, {}));
}

Attention Implementation::joint_attention(const std::vector<Stream>&, double, double) const {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "joint_attention has no kernel here");
}

std::vector<StreamGradients> Implementation::joint_attention_backward(const std::vector<Tensor>&, const Attention&,
                                                                      const std::vector<Stream>&, double, double,
                                                                      bool) const {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "joint_attention has no kernel here");
}

}  // namespace rfkernels
