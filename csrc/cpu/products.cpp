#include "products.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace rfkernels::products {
namespace {

using at::Tensor;
using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

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

const c10::TypedOperatorHandle<Pointwise>* operation() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<Pointwise>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema) return std::nullopt;
    return schema->typed<Pointwise>();
  }();
  return found ? &*found : nullptr;
}

bool by_onednn(const Tensor& x, const Tensor& weight) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && amd() && x.numel() * weight.size(0) >= kWorth &&
         at::globalContext().userEnabledMkldnn() && at::hasMKLDNN() && operation();
}

// Of any other layout oneDNN has only its slowest code.
Tensor dense(const Tensor& matrix) {
  return matrix.is_contiguous() || matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  if (!by_onednn(x, weight)) {
    const Tensor made = at::linear(x, weight, bias);
    return gelu ? at::gelu(made, "tanh") : made;
  }
  return operation()->call(x, dense(weight), bias, gelu ? "gelu" : "none", c10::List<std::optional<at::Scalar>>(), gelu ? "tanh" : "");
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (!by_onednn(a, b.t())) return at::mm(a, b);
  return operation()->call(a, dense(b.t()), std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace rfkernels::products
