#include "cuda.h"

#include "../cuda/arguments.h"
#include "launch.h"
#include "modules.h"

namespace rfkernels::launch {
namespace {

cuda::Kind kind(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? cuda::kF32 : t.scalar_type() == at::kBFloat16 ? cuda::kBF16 : cuda::kF16;
}

bool chosen(const char* name, int64_t size, const Tensor& like) { return settings(name, size, like)[0]; }

// Whether every row begins at a multiple of 16 bytes.
bool aligned(const Tensor& t) {
  if (!t.defined()) return true;
  const auto elements = static_cast<int64_t>(16 / t.element_size());
  bool all = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) all = all && (t.size(i) == 1 || t.stride(i) % elements == 0);
  return all;
}
bool aligned(const Maybe& t) { return !t || aligned(*t); }

std::string named(const char* kernel, const Tensor& like, const std::string& size) {
  return std::string(kernel) + "_" + cuda::kNames[kind(like)] + "_" + size;
}

cuda::Rows rows_of(const Maybe& t) { return t ? cuda::Rows{t->data_ptr(), t->stride(0), t->stride(1)} : cuda::Rows{}; }

cuda::Vector vector_of(const VectorGradient& of) {
  if (!of.vector) return {};
  const Tensor& v = *of.vector;
  const cuda::Rows from{v.data_ptr(), v.dim() > 1 ? v.stride(0) : 0, v.dim() == 3 ? v.stride(1) : 0};
  return {from, kind(v), v.dim() == 3 ? cuda::kStored : cuda::kSummed, of.target.data_ptr()};
}

cuda::Heads heads_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

cuda::QkNorm qk_norm_of(const Tensor& x, const Tensor& weight, double eps) {
  cuda::QkNorm made{};
  made.x = heads_of(x);
  made.weight = weight.data_ptr();
  made.rows = x.size(0) * x.size(1) * x.size(2);
  made.length = static_cast<int32_t>(x.size(1));
  made.heads = static_cast<int32_t>(x.size(2));
  made.dim = static_cast<int32_t>(x.size(3));
  made.weight_kind = kind(weight);
  made.eps = static_cast<float>(eps);
  return made;
}

// The kernel for heads of this size, or none; `all`: what it reads and writes.
std::optional<std::string> qk_norm_named(const char* kernel, std::initializer_list<const Tensor*> all) {
  const Tensor& like = **all.begin();
  const int64_t dim = like.size(3);
  if (!cuda::lanes_of(dim)) return dim > cuda::kWidestHead ? std::nullopt : std::optional(named(kernel, like, "any"));
  for (const Tensor* t : all)
    if (!aligned(*t)) return std::nullopt;
  return named(kernel, like, std::to_string(dim));
}

}  // namespace

bool cuda_adaln_backward(const Tensor& dy, const Maybe& dh, const Tensor& x, const Maybe& branch,
                         const VectorGradient& shift, const VectorGradient& scale, const VectorGradient& gate,
                         const Tensor& statistics, const Modulated& how, int64_t span, int64_t splits, const Tensor& dx,
                         const Tensor& dbranch, const Tensor& bias) {
  const int64_t channels = x.size(2);
  if (!chosen(branch ? "gated_adaln_bwd_cuda" : "adaln_bwd_cuda", channels, x)) return false;
  for (const Tensor* t : {&dy, dh ? &*dh : &x, branch ? &*branch : &x, &dx})
    if (t->scalar_type() != x.scalar_type()) return false;
  const int own = cuda::threads_of(channels), threads = own ? own : cuda::threads_of_any(channels);
  if (!threads) return false;
  if (own && !(aligned(dy) && aligned(dh) && aligned(x) && aligned(branch) && aligned(shift.vector) &&
               aligned(scale.vector) && aligned(gate.vector)))
    return false;
  const float* mean = statistics.data_ptr<float>();
  cuda::AdalnBackward a{};
  a.dy = rows_of(dy);
  a.dh = rows_of(dh);
  a.x = rows_of(x);
  a.branch = rows_of(branch);
  a.shift = vector_of(shift);
  a.scale = vector_of(scale);
  a.gate = vector_of(gate);
  a.mean = mean;
  a.rstd = mean + statistics.numel() / 2;
  a.dx = dx.data_ptr();
  a.dbranch = branch ? dbranch.data_ptr() : nullptr;
  a.bias = bias.defined() ? bias.data_ptr<float>() : nullptr;
  a.length = static_cast<int32_t>(x.size(1));
  a.span = static_cast<int32_t>(span);
  a.channels = static_cast<int32_t>(channels);
  a.one = how.plus_one ? 1.f : 0.f;
  a.rms = how.rms;
  const std::string width = own ? std::to_string(channels) : threads == cuda::kThreads ? "any" : "any_wide";
  const auto name = named(branch ? "gated_adaln_backward" : "adaln_backward", x, width);
  run_by_name(name, x, {x.size(0), splits}, static_cast<unsigned>(threads), &a);
  return true;
}

bool cuda_qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, const Tensor& q_out,
                  const Tensor& k_out, double eps) {
  if (!chosen("qk_norm_fwd_cuda", q.size(3), q)) return false;
  const auto name = qk_norm_named("qk_norm_forward", {&q, &k, &q_weight, &k_weight});
  if (!name) return false;
  cuda::QkNormPair pair{{qk_norm_of(q, q_weight, eps), qk_norm_of(k, k_weight, eps)}};
  pair.of[0].out = q_out.data_ptr();
  pair.of[1].out = k_out.data_ptr();
  const int64_t blocks = ceil_div(std::max(pair.of[0].rows, pair.of[1].rows), cuda::rows_of_block(q.size(3)));
  run_by_name(*name, q, {std::min<int64_t>(blocks, INT32_MAX), 2}, cuda::kRowThreads, &pair);
  return true;
}

bool cuda_qk_norm_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                           const Tensor& q_weight, const Tensor& k_weight, const Tensor& dq, const Tensor& dk,
                           const Tensor& partials, double eps) {
  if (!chosen("qk_norm_bwd_cuda", q.size(3), q) || dq_out.scalar_type() != q.scalar_type() ||
      dk_out.scalar_type() != k.scalar_type())
    return false;
  const auto name = qk_norm_named("qk_norm_backward", {&q, &k, &q_weight, &k_weight, &dq_out, &dk_out});
  if (!name) return false;
  cuda::QkNormPair pair{{qk_norm_of(q, q_weight, eps), qk_norm_of(k, k_weight, eps)}};
  const Tensor *grads[] = {&dq_out, &dk_out}, *made[] = {&dq, &dk};
  for (int i = 0; i < 2; ++i) {
    pair.of[i].dy = heads_of(*grads[i]);
    pair.of[i].dx = made[i]->data_ptr();
    pair.of[i].partials = partials.select(0, i).data_ptr<float>();
  }
  run_by_name(*name, q, {partials.size(1), 2}, cuda::kRowThreads, &pair);
  return true;
}

bool cuda_gelu_backward(const Tensor& h, const Tensor& da, const Tensor& a, const Tensor& dh, const Tensor& partials,
                        int64_t span, int64_t splits) {
  const int64_t channels = h.size(1);
  if (!chosen("gelu_bwd_cuda", channels, h) || da.scalar_type() != h.scalar_type()) return false;
  const bool exact = channels % cuda::kVector == 0 && aligned(h) && aligned(da);
  cuda::GeluBackward g{};
  g.h = h.data_ptr();
  g.da = da.data_ptr();
  g.a = a.numel() ? a.data_ptr() : nullptr;
  g.dh = dh.data_ptr();
  g.partials = partials.numel() ? partials.data_ptr<float>() : nullptr;
  g.rows = h.size(0);
  g.span = span;
  g.channels = static_cast<int32_t>(channels);
  run_by_name(named("gelu_backward", h, exact ? "exact" : "any"), h,
              {ceil_div(channels, cuda::kRowThreads * cuda::kVector), splits}, cuda::kRowThreads, &g);
  return true;
}

}  // namespace rfkernels::launch
