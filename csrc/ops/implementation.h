// What an implementation of the fused ops gives: forwards and backwards as functions of tensors, without autograd.
//
// Arguments are checked and canonical by then: unit-stride channels, modulation vectors [B, C], [B, S, C] or [C]. A
// vector that is not given is nullopt; its gradient, like any that is not asked for, is an undefined tensor.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace rfkernels {

using at::ScalarType;
using at::Tensor;
using Maybe = std::optional<Tensor>;
using Both = std::optional<std::pair<Tensor, Tensor>>;

// y = norm(x) * (plus_one + scale) + shift
struct Modulated {
  bool plus_one = true, rms = false;
  double eps = 1e-6;
};

struct GatedGradients {
  Tensor residual, branch, gate, shift, scale, bias;  // bias: [C], the sum of branch's over all tokens
};

// One stream of a joint attention; see rfkernels/joint_attention/layout.py.
struct Stream {
  Tensor packed, q, k, v;             // packed [B, S, 3 or 2, H, D], or q (undefined: none), k, v [B, S, H, D]
  Tensor q_weight, k_weight, lengths;
  bool asks = true;
};

struct Attention {
  std::vector<Tensor> outs;           // of the streams that ask
  Tensor lse, rstd;
};

struct StreamGradients {
  Tensor packed, q, k, v, q_weight, k_weight, bias;  // bias: [3, H, D], the sum of packed's over all tokens
};

class Implementation {
 public:
  virtual ~Implementation() = default;
  // Of the operators: rfkernels::adaln + suffix.
  virtual const char* suffix() const = 0;
  virtual std::tuple<Tensor, Tensor> adaln(const Tensor& x, const Maybe& shift, const Maybe& scale, const Modulated&,
                                           ScalarType) const = 0;
  // Gradients of x, shift, scale. in_chunks: those of chunks of a modulation are written where all of them lie.
  virtual std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& dy, const Tensor& x, const Maybe& shift,
                                                            const Maybe& scale, const Tensor& statistics,
                                                            const Modulated&, bool in_chunks) const = 0;
  virtual std::tuple<Tensor, Tensor, Tensor> gated_adaln(const Tensor& residual, const Tensor& branch,
                                                         const Maybe& gate, const Maybe& shift, const Maybe& scale,
                                                         const Modulated&, ScalarType h, ScalarType y) const = 0;
  virtual GatedGradients gated_adaln_backward(const Tensor& dh, const Tensor& dy, const Tensor& h,
                                              const Tensor& branch, const Maybe& gate, const Maybe& shift,
                                              const Maybe& scale, const Tensor& statistics, const Modulated&,
                                              ScalarType residual, bool bias, bool in_chunks) const = 0;
  virtual Tensor gated_residual(const Tensor& residual, const Tensor& branch, const Maybe& gate, ScalarType) const = 0;
  virtual std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& dh, const Tensor& branch,
                                                             const Tensor& gate, bool in_chunks) const = 0;
  virtual std::tuple<Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                             const Tensor& k_weight, double eps) const = 0;
  virtual std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& dq, const Tensor& dk,
                                                                      const Tensor& q, const Tensor& k,
                                                                      const Tensor& q_weight, const Tensor& k_weight,
                                                                      double eps) const = 0;
  // h, da [N, C] -> gelu(h), da gelu'(h), the sum of the latter over rows.
  virtual std::tuple<Tensor, Tensor, Tensor> gelu_backward(const Tensor& h, const Tensor& da, bool value,
                                                           bool bias) const = 0;
  // Products of a linear layer together with what follows them; nothing where they are better apart.
  // x [M, K], w [N, K], b [N] -> gelu(h), h = x w' + b
  virtual Both linear_gelu(const Tensor&, const Tensor&, const Maybe&) const { return std::nullopt; }
  // dy [M, K], w [K, N], h [M, N] -> dh = (dy w) gelu'(h), the sum of dh over rows
  virtual Both product_gelu_backward(const Tensor&, const Tensor&, const Tensor&) const { return std::nullopt; }
  // dy [M, N], x [M, K] -> dy' x, the sum of dy over rows
  virtual Both weight_gradient(const Tensor&, const Tensor&) const { return std::nullopt; }
  virtual Attention joint_attention(const std::vector<Stream>&, double scale, double eps) const;
  virtual std::vector<StreamGradients> joint_attention_backward(const std::vector<Tensor>& grads, const Attention&,
                                                                const std::vector<Stream>&, double scale, double eps,
                                                                bool bias) const;
};

const Implementation& cpu();       // csrc/cpu
const Implementation& launched();  // csrc/launch: Triton's kernels

// --- Small things that all of them need -------------------------------------------------------------------------------

inline Tensor fresh(const Tensor& t, ScalarType type) { return at::empty(t.sizes(), t.options().dtype(type)); }
inline Tensor fresh(const Tensor& t) { return at::empty(t.sizes(), t.options()); }

// A gradient may come expanded or transposed; the kernels need unit-stride channels.
inline Tensor unit(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

// The dtype that eager PyTorch gives residual + gate * branch, tensors of one or more dimensions.
inline ScalarType promoted(const Tensor& a, const Tensor& b, const Maybe& c) {
  const ScalarType both = c10::promoteTypes(a.scalar_type(), b.scalar_type());
  return c ? c10::promoteTypes(both, c->scalar_type()) : both;
}

}  // namespace rfkernels
