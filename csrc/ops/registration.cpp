// The operators' code on a CPU. Their schemas, fake implementations and autograd under a compiler are Python's:
// rfkernels/adaln/operators.py and its neighbours.
#include <torch/library.h>

#include "../cpu/functions.h"
#include "streams.h"

namespace rfkernels {
namespace operators {

Modulated modulated(bool plus_one, c10::string_view norm, double eps) { return {plus_one, norm == "rms", eps}; }

// An operator returns [0] for what is not asked for.
Tensor or_empty(const Tensor& t, const Tensor& like) { return t.defined() ? t : at::empty({0}, like.options()); }

std::tuple<Tensor, Tensor> adaln(const Tensor& x, const Maybe& shift, const Maybe& scale, bool plus_one,
                                 c10::string_view norm, double eps, ScalarType type) {
  return cpu().adaln(x, shift, scale, modulated(plus_one, norm, eps), type);
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& dy, const Tensor& x, const Maybe& shift,
                                                  const Maybe& scale, const Tensor& statistics, bool plus_one,
                                                  c10::string_view norm, double eps) {
  auto [dx, dshift, dscale] =
      cpu().adaln_backward(dy, x, shift, scale, statistics, modulated(plus_one, norm, eps), false);
  return {dx, or_empty(dshift, x), or_empty(dscale, x)};
}

std::tuple<Tensor, Tensor, Tensor> gated_adaln(const Tensor& residual, const Tensor& branch, const Maybe& gate,
                                               const Maybe& shift, const Maybe& scale, bool plus_one,
                                               c10::string_view norm, double eps, ScalarType type) {
  return cpu().gated_adaln(residual, branch, gate, shift, scale, modulated(plus_one, norm, eps),
                           promoted(residual, branch, gate), type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_adaln_backward(
    const Tensor& dh, const Tensor& dy, const Tensor& h, const Tensor& branch, const Maybe& gate, const Maybe& shift,
    const Maybe& scale, const Tensor& statistics, bool plus_one, c10::string_view norm, double eps, ScalarType type,
    bool bias) {
  auto made = cpu().gated_adaln_backward(dh, dy, h, branch, gate, shift, scale, statistics,
                                         modulated(plus_one, norm, eps), type, bias, false);
  return {made.residual, made.branch, or_empty(made.gate, h), or_empty(made.shift, h), or_empty(made.scale, h),
          or_empty(made.bias, branch)};
}

Tensor gated_residual(const Tensor& residual, const Tensor& branch, const Maybe& gate) {
  return cpu().gated_residual(residual, branch, gate, promoted(residual, branch, gate));
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& dh, const Tensor& branch, const Tensor& gate) {
  return cpu().gated_residual_backward(dh, branch, gate, false);
}

std::tuple<Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                                   double eps) {
  return cpu().qk_norm(q, k, q_weight, k_weight, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& dq, const Tensor& dk, const Tensor& q,
                                                            const Tensor& k, const Tensor& q_weight,
                                                            const Tensor& k_weight, double eps) {
  return cpu().qk_norm_backward(dq, dk, q, k, q_weight, k_weight, eps);
}

std::tuple<Tensor, Tensor, Tensor> gelu_backward(const Tensor& h, const Tensor& da, bool value, bool bias) {
  auto [a, dh, db] = cpu().gelu_backward(h, da, value, bias);
  return {or_empty(a, h), dh, or_empty(db, h)};
}

// Streams by the string that rfkernels/joint_attention/layout.py makes of them: "3qk,2kx".
std::vector<Stream> streams_of(at::TensorList tensors, const std::string& layout) {
  std::vector<Stream> streams(1);
  size_t next = 0;
  for (size_t i = 0; i < layout.size(); ++i) {
    Stream& s = streams.back();
    switch (layout[i]) {
      case ',': streams.emplace_back(); break;
      case '3':
      case '2':
        s.packed = tensors[next++];
        unpack(s.packed, s.q, s.k, s.v);
        break;
      case '1':
        s.q = tensors[next++];
        [[fallthrough]];
      case '0':
        s.k = tensors[next++];
        s.v = tensors[next++];
        break;
      case 'q': s.q_weight = tensors[next++]; break;
      case 'k': s.k_weight = tensors[next++]; break;
      case 'l': s.lengths = tensors[next++]; break;
      case 'x': s.asks = false; break;
      default: TORCH_CHECK(false, "joint_layout: layout is '", layout, "'; expected no rotary embedding");
    }
  }
  for (Stream& s : streams) s.asks = s.asks && s.q.defined();
  return streams;
}

std::vector<Tensor> joint_layout(at::TensorList tensors, const std::string& layout, double eps) {
  auto [q, k, v] = on_cpu::join(streams_of(tensors, layout), eps);
  return {q, k, v};
}

std::vector<Tensor> joint_layout_backward(at::TensorList grads, at::TensorList tensors, const std::string& layout,
                                          double eps) {
  std::vector<Tensor> made;
  for (Tensor& t : on_cpu::join_backward(grads.vec(), streams_of(tensors, layout), eps))
    if (t.defined()) made.push_back(std::move(t));
  return made;
}

}  // namespace operators

TORCH_LIBRARY_IMPL(rfkernels, CPU, m) {
  m.impl("adaln_native", operators::adaln);
  m.impl("adaln_native_backward", operators::adaln_backward);
  m.impl("gated_adaln_native", operators::gated_adaln);
  m.impl("gated_adaln_native_backward", operators::gated_adaln_backward);
  m.impl("gated_residual_native", operators::gated_residual);
  m.impl("gated_residual_native_backward", operators::gated_residual_backward);
  m.impl("qk_norm_native", operators::qk_norm);
  m.impl("qk_norm_native_backward", operators::qk_norm_backward);
  m.impl("gelu_backward_native", operators::gelu_backward);
  m.impl("joint_layout_native", operators::joint_layout);
  m.impl("joint_layout_native_backward", operators::joint_layout_backward);
}

}  // namespace rfkernels
