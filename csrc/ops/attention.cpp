#include "bias.h"
#include "nodes.h"
#include "streams.h"

namespace rfkernels {
namespace {

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

Attention Implementation::joint_attention(const std::vector<Stream>&, double, double) const {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "joint_attention has no kernel here");
}

std::vector<StreamGradients> Implementation::joint_attention_backward(const std::vector<Tensor>&, const Attention&,
                                                                      const std::vector<Stream>&, double, double,
                                                                      bool) const {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "joint_attention has no kernel here");
}

}  // namespace rfkernels
