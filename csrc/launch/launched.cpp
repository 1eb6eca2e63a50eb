// Triton's kernels as an implementation: what rfkernels/*/launch.py does, launched from here.
#include "attention.h"
#include "cuda.h"
#include "launch.h"
#include "../lt/lt.h"
#include "../ops/chunks.h"
#include "../ops/implementation.h"

namespace rfkernels {
namespace {

using launch::Call;
using launch::ceil_div;
using launch::kMostGrid;
using launch::Kernel;
using launch::settings;

constexpr const char* kFamily = "rfkernels.adaln.kernels";
constexpr Kernel kAdaln{kFamily, "adaln_fwd"}, kGatedAdaln{kFamily, "gated_adaln_fwd"},
    kAdalnBackward{kFamily, "adaln_bwd"}, kSum{kFamily, "sum_partials"}, kResidual{kFamily, "gated_residual_fwd"},
    kResidualBackward{kFamily, "gated_residual_bwd"};
constexpr Kernel kQkNorm{"rfkernels.qk_norm.kernels", "qk_norm_fwd"},
    kQkNormBackward{"rfkernels.qk_norm.kernels", "qk_norm_bwd"}, kGelu{"rfkernels.mlp.kernels", "gelu_bwd"};

// As in launch.py: programs of a backward for each multiprocessor, elements of a program at a time, the second stage's tile.
constexpr int64_t kQkNormPrograms = 4, kGeluPrograms = 8, kForwardElements = 2048, kBackwardElements = 4096;
constexpr int64_t kSumRows = 32, kSumColumns = 32, kSumWarps = 2;

enum Way : int64_t { kNone, kSummed, kStored };             // what becomes of a vector's gradient

Way way(const Maybe& v) { return !v ? kNone : v->dim() == 3 ? kStored : kSummed; }

int64_t multiprocessors(const Tensor& like) { return settings("multiprocessors", 0, like)[0]; }

// Batch and token stride.
void rows(Call& call, const Tensor& t) { call << t.stride(0) << t.stride(1); }
void vector(Call& call, const Maybe& v) {
  call << (!v || v->dim() == 1 ? int64_t{0} : v->stride(0)) << (v && v->dim() == 3 ? v->stride(1) : int64_t{0});
}

// A row-wise kernel's compile-time arguments, with those settings.
int64_t covered(Call& call, const char* name, const Tensor& x, bool backward = false) {
  const auto& found = settings(name, x.size(2), x);         // rows, chunk, chunks, warps, programs, stages
  call.with("C", x.size(2)).with("ROWS", found[0]).with("CHUNK", found[1]).with("CHUNKS", found[2]);
  if (backward) call.with("STAGES", found[5]);
  call.with("num_warps", found[3]).with("enable_fp_fusion", true);
  return found[0];
}

Tensor statistics_of(const Tensor& x) { return at::empty({2, x.size(0), x.size(1)}, x.options().dtype(at::kFloat)); }

void run_sums(Call& call, int64_t groups, int64_t channels, int64_t vectors) {
  call.with("C", channels).with("ROWS", kSumRows).with("CHUNK", kSumColumns).with("num_warps", kSumWarps);
  call.with("enable_fp_fusion", true);
  call.run({groups, ceil_div(channels, kSumColumns), vectors});
}

// Gradients of vectors that tokens share: partial sums and a second stage that adds them in a fixed order.
struct Sums {
  std::vector<Tensor> gradients, targets;
  int64_t span, splits;

  // name: of the kernel.
  Sums(const Tensor& x, const char* name, const std::vector<Maybe>& vectors, bool in_chunks) {
    const auto& found = settings(name, x.size(2), x);
    const int64_t batch = x.size(0), length = x.size(1), rows = found[0], wanted = found[4] * multiprocessors(x) / batch;
    splits = std::max<int64_t>(1, std::min(wanted, ceil_div(length, rows)));
    span = ceil_div(ceil_div(length, splits), rows) * rows;
    splits = ceil_div(length, span);
    for (const Maybe& v : vectors) {
      gradients.push_back(v ? gradient_of(*v, in_chunks) : Tensor());
      if (v && v->dim() < 3) shared_.push_back(gradients.back());
    }
    total_ = batch * splits;
    partials_ = at::empty({static_cast<int64_t>(shared_.size()), total_, x.size(2)}, x.options().dtype(at::kFloat));
    int64_t next = 0;
    for (size_t i = 0; i < vectors.size(); ++i)
      targets.push_back(vectors[i] && vectors[i]->dim() < 3 ? partials_.select(0, next++) : gradients[i]);
  }

  void finish() const {
    if (shared_.empty()) return;
    const int64_t channels = partials_.size(2), count = static_cast<int64_t>(shared_.size());
    std::array<const Tensor*, 4> outs;
    int64_t least = total_;
    for (int64_t i = 0; i < 4; ++i) outs[i] = &shared_[i < count ? i : 0];
    Call call(kSum, partials_);
    call << partials_;
    for (const Tensor* out : outs) call << *out;
    call << total_;
    for (const Tensor* out : outs) {
      const int64_t size = out->dim() == 1 ? total_ : splits;
      least = std::min(least, size);
      call << size;
    }
    for (const Tensor* out : outs) call << (out->dim() == 1 ? int64_t{0} : out->stride(0));
    run_sums(call, total_ / least, channels, count);
  }

 private:
  std::vector<Tensor> shared_;
  Tensor partials_;
  int64_t total_;
};

// Each of outs: the sums over the rows of its part of partials [outs, rows, C] fp32, in a fixed order.
void column_sums(const Tensor& partials, const std::vector<Tensor>& outs) {
  const int64_t made = partials.size(0), count = partials.size(1), channels = partials.size(2);
  if (channels > kSumColumns * kMostGrid) {
    for (int64_t i = 0; i < made; ++i) outs[i].copy_(partials[i].sum(0).view_as(outs[i]));
    return;
  }
  Call call(kSum, partials);
  call << partials;
  for (int64_t i = 0; i < 4; ++i) call << outs[i < made ? i : 0];
  call << count << count << count << count << count;
  call.all(std::array<int64_t, 4>{0, 0, 0, 0});
  run_sums(call, 1, channels, made);
}

class Launched : public Implementation {
 public:
  const char* suffix() const override { return ""; }

  std::tuple<Tensor, Tensor> adaln(const Tensor& x, const Maybe& shift, const Maybe& scale, const Modulated& how,
                                   ScalarType type) const override {
    Tensor y = fresh(x, type), statistics = statistics_of(x);
    Call call(kAdaln, x);
    call << x << shift << scale << y << statistics << x.size(1) << how.eps;
    rows(call, x);
    vector(call, shift);
    vector(call, scale);
    call.with("RMS", how.rms).with("ONE", how.plus_one ? 1.0 : 0.0);
    const int64_t tokens = covered(call, "adaln_fwd", x);
    call.run({x.size(0) * ceil_div(x.size(1), tokens)});
    return {y, statistics};
  }

  std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& given, const Tensor& x, const Maybe& shift,
                                                    const Maybe& scale, const Tensor& statistics,
                                                    const Modulated& how, bool in_chunks) const override {
    auto made = backward(given, Maybe(), x, Maybe(), Maybe(), shift, scale, statistics, how, x.scalar_type(), false,
                         in_chunks);
    return {made.residual, made.shift, made.scale};
  }

  std::tuple<Tensor, Tensor, Tensor> gated_adaln(const Tensor& residual, const Tensor& branch, const Maybe& gate,
                                                 const Maybe& shift, const Maybe& scale, const Modulated& how,
                                                 ScalarType h_type, ScalarType type) const override {
    Tensor h = fresh(residual, h_type), y = fresh(residual, type), statistics = statistics_of(residual);
    Call call(kGatedAdaln, residual);
    call << residual << branch << gate << shift << scale << h << y << statistics << residual.size(1) << how.eps;
    rows(call, residual);
    rows(call, branch);
    vector(call, gate);
    vector(call, shift);
    vector(call, scale);
    call.with("RMS", how.rms).with("ONE", how.plus_one ? 1.0 : 0.0);
    const int64_t tokens = covered(call, "gated_adaln_fwd", residual);
    call.run({residual.size(0) * ceil_div(residual.size(1), tokens)});
    return {h, y, statistics};
  }

  GatedGradients gated_adaln_backward(const Tensor& dh, const Tensor& dy, const Tensor& h, const Tensor& branch,
                                      const Maybe& gate, const Maybe& shift, const Maybe& scale,
                                      const Tensor& statistics, const Modulated& how, ScalarType residual, bool bias,
                                      bool in_chunks) const override {
    return backward(dy, dh, h, branch, gate, shift, scale, statistics, how, residual, bias, in_chunks);
  }

  Tensor gated_residual(const Tensor& residual, const Tensor& branch, const Maybe& gate,
                        ScalarType type) const override {
    Tensor h = fresh(residual, type);
    Call call(kResidual, residual);
    call << residual << branch << gate << h << residual.size(1);
    rows(call, residual);
    rows(call, branch);
    vector(call, gate);
    const bool mixed = residual.scalar_type() != branch.scalar_type();
    const int64_t tokens = covered(call, mixed ? "gated_residual_fwd_mixed" : "gated_residual_fwd", residual);
    call.run({residual.size(0) * ceil_div(residual.size(1), tokens)});
    return h;
  }

  std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& given, const Tensor& branch, const Tensor& gate,
                                                     bool in_chunks) const override {
    const Tensor dh = unit(given), dbranch = fresh(branch);
    Call call(kResidualBackward, branch);
    const Sums sums(branch, "gated_residual_bwd", {gate}, in_chunks);
    call << dh << branch << gate << dbranch << sums.targets[0] << branch.size(1) << sums.span;
    rows(call, dh);
    rows(call, branch);
    vector(call, gate);
    call.with("GATE", static_cast<int64_t>(way(gate)));
    covered(call, "gated_residual_bwd", branch, true);
    call.run({branch.size(0), sums.splits});
    sums.finish();
    return {dbranch, sums.gradients[0]};
  }

  std::tuple<Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& given_q_weight,
                                     const Tensor& given_k_weight, double eps) const override {
    const Tensor q_weight = given_q_weight.contiguous(), k_weight = given_k_weight.contiguous();
    Tensor normal_q = fresh(q), normal_k = fresh(k);
    if (launch::cuda_qk_norm(q, k, q_weight, k_weight, normal_q, normal_k, eps)) return {normal_q, normal_k};
    Call call(kQkNorm, q);
    call << q << k << q_weight << k_weight << normal_q << normal_k << strides(q) << strides(k);
    sizes(call, q, k);
    call << count(q) << count(k) << eps;
    const int64_t tokens = heads(call, q.size(3), kForwardElements);
    call.run({ceil_div(std::max(count(q), count(k)), tokens), 2});
    return {normal_q, normal_k};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& given_dq, const Tensor& given_dk,
                                                              const Tensor& q, const Tensor& k,
                                                              const Tensor& given_q_weight,
                                                              const Tensor& given_k_weight,
                                                              double eps) const override {
    const Tensor dq_out = unit(given_dq), dk_out = unit(given_dk);
    const Tensor q_weight = given_q_weight.contiguous(), k_weight = given_k_weight.contiguous();
    Tensor dq = fresh(q), dk = fresh(k), dq_weight = fresh(q_weight), dk_weight = fresh(k_weight);
    Call call(kQkNormBackward, q);
    const int64_t tokens = heads(call, q.size(3), kBackwardElements);
    const int64_t most = std::max(count(q), count(k));
    const int64_t programs = std::max<int64_t>(
        1, std::min(ceil_div(most, tokens), kQkNormPrograms * multiprocessors(q) / 2));
    const Tensor partials = at::empty({2, programs, q.size(3)}, q.options().dtype(at::kFloat));
    const Tensor q_sums = partials.select(0, 0), k_sums = partials.select(0, 1);
    const auto made = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
      column_sums(partials, {dq_weight, dk_weight});
      return {dq, dk, dq_weight, dk_weight};
    };
    if (launch::cuda_qk_norm_backward(dq_out, dk_out, q, k, q_weight, k_weight, dq, dk, partials, eps)) return made();
    call << dq_out << dk_out << q << k << q_weight << k_weight << dq << dk << q_sums << k_sums << strides(dq_out)
         << strides(dk_out) << strides(q) << strides(k);
    sizes(call, q, k);
    const auto span = [&](const Tensor& x) {
      return ceil_div(std::max<int64_t>(1, count(x)), programs * tokens) * tokens;
    };
    call << count(q) << count(k) << span(q) << span(k) << eps;
    call.run({programs, 2});
    return made();
  }

  std::tuple<Tensor, Tensor, Tensor> gelu_backward(const Tensor& given_h, const Tensor& given_da, bool value,
                                                   bool bias) const override {
    const Tensor h = given_h.contiguous(), da = given_da.contiguous();
    Tensor dh = fresh(h), a = value ? fresh(h) : at::empty({0}, h.options());
    const int64_t rows = h.size(0), channels = h.size(1);
    Tensor db = bias ? at::empty({channels}, h.options()) : Tensor();
    const auto& found = settings("gelu_bwd", channels, h);  // rows, chunk, warps
    const int64_t columns = ceil_div(channels, found[1]);
    int64_t splits = std::max<int64_t>(
        1, std::min({ceil_div(rows, found[0]), ceil_div(kGeluPrograms * multiprocessors(h), columns), kMostGrid}));
    const int64_t span = ceil_div(rows, splits * found[0]) * found[0];
    splits = ceil_div(rows, span);
    const Tensor partials = at::empty({bias ? splits : 0, channels}, h.options().dtype(at::kFloat));
    const auto made = [&]() -> std::tuple<Tensor, Tensor, Tensor> {
      if (bias) column_sums(partials.unsqueeze(0), {db});
      return {value ? a : Tensor(), dh, db};
    };
    if (launch::cuda_gelu_backward(h, da, a, dh, partials, span, splits)) return made();
    Call call(kGelu, h);
    call << h << da << a << dh << partials << rows << span;
    call.with("C", channels).with("VALUE", value).with("BIAS", bias).with("ROWS", found[0]).with("CHUNK", found[1]);
    call.with("num_warps", found[2]).with("enable_fp_fusion", true);
    call.run({columns, splits});
    return made();
  }

  Both linear_gelu(const Tensor& x, const Tensor& w, const Maybe& b) const override {
    return b && settings("gelu_fwd_lt", w.size(0), x)[0] ? lt::linear_gelu(x, w, *b) : std::nullopt;
  }
  Both product_gelu_backward(const Tensor& dy, const Tensor& w, const Tensor& h) const override {
    return settings("gelu_bwd_lt", w.size(1), dy)[0] ? lt::product_gelu_backward(dy, w, h) : std::nullopt;
  }
  Both weight_gradient(const Tensor& dy, const Tensor& x) const override {
    return settings("bias_gradient_lt", dy.size(1), dy)[0] ? lt::weight_gradient(dy, x) : std::nullopt;
  }

  Attention joint_attention(const std::vector<Stream>& streams, double scale, double eps) const override {
    return launch::attention(streams, scale, eps);
  }

  std::vector<StreamGradients> joint_attention_backward(const std::vector<Tensor>& grads, const Attention& made,
                                                        const std::vector<Stream>& streams, double scale, double eps,
                                                        bool bias) const override {
    return launch::attention_backward(grads, made, streams, scale, eps, bias);
  }

 private:
  static std::vector<int64_t> strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
  static int64_t count(const Tensor& x) { return x.size(0) * x.size(1) * x.size(2); }

  // Tokens, then heads, of both.
  static void sizes(Call& call, const Tensor& q, const Tensor& k) {
    for (int i = 1; i < 3; ++i) call << std::max<int64_t>(1, q.size(i)) << std::max<int64_t>(1, k.size(i));
  }

  static int64_t heads(Call& call, int64_t dim, int64_t elements) {
    int64_t block = 16;
    while (block < dim) block *= 2;
    const int64_t tokens = std::max<int64_t>(1, elements / block);
    call.with("D", dim).with("ROWS", tokens).with("BLOCK_D", block).with("num_warps", 4).with("enable_fp_fusion", true);
    return tokens;
  }

  static GatedGradients backward(const Tensor& given_dy, const Maybe& given_dh, const Tensor& x, const Maybe& branch,
                                 const Maybe& gate, const Maybe& shift, const Maybe& scale, const Tensor& statistics,
                                 const Modulated& how, ScalarType type, bool bias, bool in_chunks) {
    const Tensor dy = unit(given_dy);
    const Maybe dh = given_dh ? Maybe(unit(*given_dh)) : given_dh;
    const bool mixed = branch && branch->scalar_type() != x.scalar_type();
    const char* name = !branch ? "adaln_bwd" : mixed ? "gated_adaln_bwd_mixed" : "gated_adaln_bwd";
    std::vector<Maybe> vectors{shift, scale};
    if (branch) {
      vectors.push_back(gate);
      vectors.push_back(bias ? Maybe(branch->select(0, 0).select(0, 0)) : Maybe());
    }
    const Sums sums(x, name, vectors, in_chunks);
    Tensor dx = fresh(x, type), dbranch = branch ? fresh(*branch) : Tensor();
    const auto made = [&]() -> GatedGradients {
      sums.finish();
      if (!branch) return {dx, Tensor(), Tensor(), sums.gradients[0], sums.gradients[1], Tensor()};
      return {dx, dbranch, sums.gradients[2], sums.gradients[0], sums.gradients[1], sums.gradients[3]};
    };
    const Tensor none;
    if (launch::cuda_adaln_backward(dy, dh, x, branch, {shift, sums.targets[0]}, {scale, sums.targets[1]},
                                    {gate, branch ? sums.targets[2] : none}, statistics, how, sums.span, sums.splits, dx,
                                    dbranch, branch ? sums.targets[3] : none))
      return made();
    Call call(kAdalnBackward, x);
    call << dy << dh << x << branch << gate << scale << statistics << dx << dbranch << sums.targets[0]
         << sums.targets[1] << (branch ? sums.targets[2] : none) << (branch ? sums.targets[3] : none) << x.size(1)
         << sums.span;
    rows(call, dy);
    pair(call, dh);
    rows(call, x);
    pair(call, branch);
    vector(call, gate);
    vector(call, scale);
    call.with("RMS", how.rms).with("GATED", branch.has_value()).with("SHIFT", static_cast<int64_t>(way(shift)));
    call.with("SCALE", static_cast<int64_t>(way(scale))).with("GATE", static_cast<int64_t>(way(gate)));
    call.with("BIAS", bias).with("ONE", how.plus_one ? 1.0 : 0.0);
    covered(call, name, x, true);
    call.run({x.size(0), sums.splits});
    return made();
  }

  static void pair(Call& call, const Maybe& t) {
    if (t)
      rows(call, *t);
    else
      call << int64_t{0} << int64_t{0};
  }
};

}  // namespace

const Implementation& launched() {
  static const Launched made;
  return made;
}

}  // namespace rfkernels
