// Linear layers and the MLP.
#include "../cpu/products.h"
#include "bias.h"
#include "nodes.h"

namespace rfkernels {
namespace {

Tensor rows_of(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

// What a function gives may be changed in place, as PyTorch's own may: autograd refuses that of a view made inside.
Tensor owned(const Tensor& made) { return made.is_view() ? at::_unsafe_view(made, made.sizes()) : made; }

// By PyTorch's own operator where a graph is wanted or somebody watches.
Tensor product(const Tensor& a, const Tensor& b) {
  return at::GradMode::is_enabled() || watched() || !plain(a) || !plain(b) ? at::mm(a, b) : products::mm(a, b);
}

// Of a layer: gradients of its weight and bias, each where it is asked for; rows: the gradient of its output, [M, N].
std::pair<Tensor, Tensor> layer_gradients(const Implementation& by, const Tensor& gradient, const Tensor& rows,
                                          const std::function<Tensor()>& x, bool weight, bool bias) {
  const bool plainly = at::GradMode::is_enabled() || watched() || !plain(rows);
  Tensor sums = bias && !at::GradMode::is_enabled() ? take_sums(gradient) : Tensor();
  if (sums.defined()) sums = sums.view({-1});
  if (!weight) return {Tensor(), bias && !sums.defined() ? rows.sum(0) : sums};
  const Tensor in = x();
  if (bias && !sums.defined() && !plainly)
    if (auto made = by.weight_gradient(rows, in)) return *made;
  return {product(rows.t(), in), bias && !sums.defined() ? rows.sum(0) : sums};
}

struct LinearFunction : Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias,
                        at::IntArrayRef shape, const Call& call) {
    ctx->save_for_backward({weight.requires_grad() ? x : Tensor(), weight});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["shape"] = x.sizes();
    call.keep(ctx);
    const Tensor out = products::linear(x, weight, bias);
    return owned(shape.empty() ? out : out.unflatten(-1, shape));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor rows = grads[0].reshape({-1, weight.size(0)});
    variable_list made(5);
    if (ctx->needs_input_grad(0)) made[0] = product(rows, weight).view(ctx->saved_data["shape"].toIntVector());
    const bool bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    std::tie(made[1], made[2]) = layer_gradients(*Call(ctx).implementation, grads[0], rows, [&] { return rows_of(x); },
                                                 ctx->needs_input_grad(1), bias);
    return made;
  }
};

struct GeluMlpFunction : Function<GeluMlpFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2,
                        const Maybe& b2, const Call& call) {
    ctx->saved_data["bias"] = b2.has_value();
    call.keep(ctx);
    Tensor h, a;
    if (auto made = call.implementation->linear_gelu(rows_of(x), w1, b1)) {
      const auto like_x = [&](const Tensor& t) {
        auto sizes = x.sizes().vec();
        sizes.back() = t.size(1);
        return t.view(sizes);
      };
      a = like_x(made->first);
      h = like_x(made->second);
    } else {
      h = products::linear(x, w1, b1);
      a = at::gelu(h, "tanh");
    }
    ctx->save_for_backward({x, w1, h, w2, value(b1)});
    return owned(products::linear(a, w2, b2));
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
    Tensor a, dh, sums;
    const Both both = dx || dw1 || db1 ? call.implementation->product_gelu_backward(rows, w2, rows_of(h)) : std::nullopt;
    if (both)
      std::tie(dh, sums) = *both;
    else if (dx || dw1 || db1 || dw2)
      std::tie(a, dh, sums) = call.implementation->gelu_backward(rows_of(h), product(rows, w2), dw2, db1);
    if (dx) made[0] = product(dh, w1).view(x.sizes());
    if (dw1) made[1] = product(dh.t(), rows_of(x));
    if (db1) made[2] = sums;
    const auto activated = [&] { return a.defined() ? a : at::gelu(rows_of(h), "tanh"); };
    std::tie(made[3], made[4]) = layer_gradients(*call.implementation, dy, rows, activated, dw2, db2);
    return made;
  }
};

}  // namespace

Tensor linear(const Implementation& by, const Tensor& x, const Tensor& weight, const Maybe& bias,
              at::IntArrayRef shape) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || differentiable(bias)))
    return LinearFunction::apply(x, weight, bias, shape, Call(by, {}));
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

}  // namespace rfkernels
