#include "products.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace rfkernels::products {
namespace {

using at::Tensor;
using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

using Binary = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view);

constexpr int64_t kDepth = 256;      // terms of a sum in a row: oneDNN adds them all in one chain, which rounds more
constexpr int64_t kWorth = 1 << 18;  // multiplications from which a call of oneDNN costs less than it saves

bool amd() {
#if defined(__x86_64__)
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx2");
  }();
  return found;
#else
  return false;
#endif
}

struct Operators {
  c10::TypedOperatorHandle<Pointwise> linear;
  c10::TypedOperatorHandle<Binary> added;
};

const Operators* operators() {
  static const auto found = []() -> std::optional<Operators> {
    auto& all = c10::Dispatcher::singleton();
    const auto linear = all.findSchema({"mkldnn::_linear_pointwise", ""});
    const auto added = all.findSchema({"mkldnn::_linear_pointwise", "binary"});
    if (!linear || !added) return std::nullopt;
    return Operators{linear->typed<Pointwise>(), added->typed<Binary>()};
  }();
  return found ? &*found : nullptr;
}

bool by_onednn(const Tensor& x, const Tensor& weight) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && amd() && x.numel() * weight.size(0) >= kWorth &&
         at::globalContext().userEnabledMkldnn() && at::hasMKLDNN() && operators();
}

// Of any other layout oneDNN has only its slowest code.
Tensor dense(const Tensor& matrix) {
  return matrix.is_contiguous() || matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

// x [M, K] times weight [N, K] transposed, plus bias, in blocks of kDepth.
Tensor blocks(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t depth = x.size(1), parts = (depth + kDepth - 1) / kDepth;
  Tensor made;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = depth * i / parts, size = depth * (i + 1) / parts - first;
    const Tensor left = x.narrow(1, first, size), right = dense(weight.narrow(1, first, size));
    made = i ? operators()->added.call(left, made, right, std::nullopt, "add")
             : operators()->linear.call(left, right, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
  return made;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  const auto activated = [&](const Tensor& made) { return gelu ? at::gelu(made, "tanh") : made; };
  if (!by_onednn(x, weight)) return activated(at::linear(x, weight, bias));
  if (gelu && x.size(-1) <= kDepth)
    return operators()->linear.call(x, dense(weight), bias, "gelu", c10::List<std::optional<at::Scalar>>(), "tanh");
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return activated(blocks(x.reshape({-1, x.size(-1)}), weight, bias).view(shape));
}

Tensor mm(const Tensor& a, const Tensor& b) {
  return by_onednn(a, b.t()) ? blocks(a, b.t(), std::nullopt) : at::mm(a, b);
}

}  // namespace rfkernels::products
