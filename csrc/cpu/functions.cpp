#include "functions.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "../ops/streams.h"
#include "cpu.h"
#include "patches.h"
#include "products.h"

namespace rfkernels::on_cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;

// --- Rectified flow ---------------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;       // elements of a sample at a time: what is summed in one go

// body(sample, block, first element from the tensor's, elements, scratch)
template <typename Body>
void for_blocks(const Tensor& x, const Body& body) {
  const int64_t elements = x.numel() / x.size(0), blocks = (elements + kBlock - 1) / kBlock;
  at::parallel_for(0, x.size(0) * blocks, 4, [&](int64_t first, int64_t last) {
    std::vector<float> room(4 * kBlock);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / blocks, begin = i % blocks * kBlock;
      body(b, i, b * elements + begin, std::min(kBlock, elements - begin), room.data());
    }
  });
}

// One sum of a value of its blocks for each sample, in order: [B] fp32.
template <typename Block>
Tensor per_sample(const Tensor& x, const Block& block) {
  const int64_t batch = x.size(0), blocks = (x.numel() / batch + kBlock - 1) / kBlock;
  std::vector<double> sums(batch * blocks);
  for_blocks(x, [&](int64_t, int64_t i, int64_t at, int64_t n, float* room) { sums[i] = block(at, n, room); });
  Tensor made = at::empty({batch}, x.options().dtype(at::kFloat));
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks; ++i) sum += sums[b * blocks + i];
    made.data_ptr<float>()[b] = static_cast<float>(sum);
  }
  return made;
}

std::tuple<Tensor, Tensor> flow(const Tensor& first, const Tensor& second, const Tensor& t, bool backward) {
  const Tensor a = first.contiguous(), b = second.contiguous();
  Tensor left = at::empty_like(a), right = at::empty_like(a);
  const float* times = t.data_ptr<float>();
  for_blocks(a, [&](int64_t sample, int64_t, int64_t at, int64_t n, float* room) {
    cpu_kernels().flow(n, times[sample], bytes(a, at), bytes(b, at), bytes(left, at), bytes(right, at), dtype_of(a),
                       backward, room);
  });
  return {left, right};
}

struct FlowFunction : Function<FlowFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x0, const Tensor& noise, const Tensor& t) {
    ctx->save_for_backward(t.requires_grad() ? variable_list{t, x0, noise} : variable_list{t});
    auto [z, target] = flow(x0, noise, t, false);
    return {z, target};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &t = saved[0], &dz = grads[0], &dtarget = grads[1];
    const bool wants_time = saved.size() > 1;
    if (with_graph(grads)) {
      std::vector<int64_t> shape(dz.dim(), 1);
      shape[0] = -1;
      const Tensor time = t.reshape(shape), wide = dz.to(at::kFloat), other = dtarget.to(at::kFloat);
      const Tensor dt = wants_time ? (wide * (saved[2].to(at::kFloat) - saved[1].to(at::kFloat))).reshape({t.size(0), -1}).sum(1) : Tensor();
      return {((1 - time) * wide - other).to(dz.scalar_type()), (time * wide + other).to(dz.scalar_type()), dt};
    }
    auto [dx0, dnoise] = flow(dz, dtarget, t, true);
    Tensor dt;
    if (wants_time) {
      const Tensor x0 = saved[1].contiguous(), noise = saved[2].contiguous(), dense = dz.contiguous();
      dt = per_sample(dense, [&](int64_t at, int64_t n, float* room) {
        return cpu_kernels().along(n, bytes(dense, at), bytes(x0, at), bytes(noise, at), dtype_of(dense), room);
      });
    }
    return {dx0, dnoise, dt};
  }
};

struct ErrorFunction : Function<ErrorFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& prediction, const Tensor& target, const Tensor& weight) {
    const Tensor errors = errors_of(prediction, target);
    ctx->save_for_backward({prediction, target, weight, errors});
    return of(errors, weight, prediction.numel());
  }
  static Tensor errors_of(const Tensor& given, const Tensor& other) {
    const Tensor prediction = given.contiguous(), target = other.contiguous();
    return per_sample(prediction, [&](int64_t at, int64_t n, float* room) {
      return cpu_kernels().squared_error(n, bytes(prediction, at), dtype_of(prediction), bytes(target, at),
                                         dtype_of(target), room);
    });
  }
  static Tensor of(const Tensor& errors, const Tensor& weight, int64_t elements) {
    double total = 0.0;
    for (int64_t b = 0; b < errors.size(0); ++b) total += double(weight.data_ptr<float>()[b]) * errors.data_ptr<float>()[b];
    Tensor loss = at::empty({}, errors.options());
    *loss.data_ptr<float>() = static_cast<float>(total / static_cast<double>(elements));
    return loss;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &given = saved[0], &other = saved[1], &weight = saved[2];
    const bool both = ctx->needs_input_grad(1), wants_weight = ctx->needs_input_grad(2);
    if (with_graph(grads)) {
      std::vector<int64_t> shape(given.dim(), 1);
      shape[0] = -1;
      const Tensor factor = (weight * (2.0 / static_cast<double>(given.numel())) * grads[0]).reshape(shape);
      const Tensor error = given.to(at::kFloat) - other.to(at::kFloat), made = factor * error;
      const Tensor dweight = error.square().reshape({weight.size(0), -1}).sum(1) * (grads[0] / static_cast<double>(given.numel()));
      return {made.to(given.scalar_type()), both ? (-made).to(other.scalar_type()) : Tensor(),
              wants_weight ? dweight : Tensor()};
    }
    const Tensor prediction = given.contiguous(), target = other.contiguous();
    Tensor dprediction = at::empty_like(prediction), dtarget = both ? at::empty_like(target) : Tensor();
    const double scale = 2.0 / static_cast<double>(prediction.numel()) * grads[0].item<float>();
    const float* weights = weight.data_ptr<float>();
    for_blocks(prediction, [&](int64_t b, int64_t, int64_t at, int64_t n, float* room) {
      cpu_kernels().error_gradient(n, static_cast<float>(scale * weights[b]), bytes(prediction, at), dtype_of(prediction),
                                   bytes(target, at), dtype_of(target), bytes(dprediction, at),
                                   both ? bytes(dtarget, at) : nullptr, room);
    });
    return {dprediction, dtarget, wants_weight ? saved[3].to(at::kDouble).mul(0.5 * scale).to(at::kFloat) : Tensor()};
  }
};

// --- Patches ----------------------------------------------------------------------------------------------------------

// In fp32 a convolution is the fastest product here (oneDNN, channels last: 1.5 times MKL's on an AMD EPYC), in 16 bits a
// product of patches is (2 times).
bool by_convolution(const Tensor& weight) { return weight.scalar_type() == at::kFloat; }

struct EmbedFunction : Function<EmbedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& latent, const Tensor& weight, const Maybe& bias,
                        const Tensor& positions, int64_t p, ScalarType type) {
    ctx->save_for_backward({latent, weight});                                      // its patches are quickly made again
    ctx->saved_data["bias"] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    ctx->saved_data["positions"] = static_cast<int64_t>(positions.scalar_type());
    const int64_t n = weight.size(0), tokens = positions.size(0);
    const auto convolved = [&] {
      return at::conv2d(latent.contiguous(at::MemoryFormat::ChannelsLast), weight, {}, p).permute({0, 2, 3, 1});
    };
    const Tensor products = by_convolution(weight)
                                ? convolved().reshape({-1, n}).contiguous()
                                : at::mm(patches_of(latent, p, true), weight.view({n, -1}).t());
    Tensor added = positions.to(at::kFloat).contiguous();
    if (bias) added = added + bias->to(at::kFloat);
    const bool in_place = type == at::kFloat && products.scalar_type() == at::kFloat;
    Tensor out = in_place ? products : at::empty(products.sizes(), products.options().dtype(type));
    at::parallel_for(0, products.size(0), std::max<int64_t>(1, 16384 / n), [&](int64_t first, int64_t last) {
      std::vector<float> room(2 * n);
      for (int64_t i = first; i < last; ++i)
        cpu_kernels().add(n, bytes(products, i * n), dtype_of(products),
                          added.data_ptr<float>() + i % tokens * n, bytes(out, i * n), dtype_of(out), room.data());
    });
    return out.view({latent.size(0), tokens, n});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &latent = saved[0], &weight = saved[1], &dy = grads[0];
    const int64_t p = weight.size(3), bias = ctx->saved_data["bias"].toInt();
    size_t edge = 2;
    const bool wants_bias = bias >= 0 && ctx->needs_input_grad(edge++), wants_positions = ctx->needs_input_grad(edge);
    variable_list made(6);
    if (by_convolution(weight)) {
      const int64_t h = latent.size(2) / p;
      const Tensor grad = dy.to(at::kFloat).view({latent.size(0), h, -1, dy.size(2)}).permute({0, 3, 1, 2});
      const Tensor input = grad.is_contiguous() ? latent : latent.contiguous(at::MemoryFormat::ChannelsLast);
      auto [dlatent, dweight, none] =
          at::convolution_backward(grad, input, weight, c10::nullopt, {p, p}, {0, 0}, {1, 1}, false, {0, 0}, 1,
                                   {ctx->needs_input_grad(0), ctx->needs_input_grad(1), false});
      made[0] = dlatent;
      made[1] = dweight;
      return sums_of(ctx, dy, std::move(made), bias, wants_bias, wants_positions);
    }
    const Tensor rows = dy.reshape({-1, dy.size(2)}).to(weight.scalar_type());
    if (ctx->needs_input_grad(0))
      made[0] = latent_of(at::mm(rows, weight.view({weight.size(0), -1})), latent.sizes(), p, true);
    if (ctx->needs_input_grad(1)) made[1] = at::mm(rows.t(), patches_of(latent, p, true)).view(weight.sizes());
    return sums_of(ctx, dy, std::move(made), bias, wants_bias, wants_positions);
  }
  static variable_list sums_of(AutogradContext* ctx, const Tensor& dy, variable_list made, int64_t bias,
                               bool wants_bias, bool wants_positions) {
    if (!wants_bias && !wants_positions) return made;
    const Tensor sums = dy.sum(0, false, at::kFloat);
    if (wants_bias) made[2] = sums.sum(0).to(static_cast<ScalarType>(bias));
    if (wants_positions) made[3] = sums.to(static_cast<ScalarType>(ctx->saved_data["positions"].toInt()));
    return made;
  }
};

struct UnembedFunction : Function<UnembedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias, int64_t height,
                        int64_t width, int64_t p) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["p"] = p;
    ctx->saved_data["bias"] = bias.has_value();
    return latent_of(products::linear(x, weight, bias), {x.size(0), weight.size(0) / (p * p), height, width}, p, false);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor rows = patches_of(grads[0], ctx->saved_data["p"].toInt(), false);
    variable_list made(6);
    const auto product = [](const Tensor& a, const Tensor& b) {
      return at::GradMode::is_enabled() || watched() || !plain(a) ? at::mm(a, b) : products::mm(a, b);
    };
    if (ctx->needs_input_grad(0)) made[0] = product(rows, weight).view(x.sizes());
    if (ctx->needs_input_grad(1)) made[1] = product(rows.t(), x.reshape({-1, x.size(2)}));
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) made[2] = rows.sum(0);
    return made;
  }
};

// --- Joint q, k and v -------------------------------------------------------------------------------------------------

// normalised into its tokens of `joint`, or copied.
void place(const Tensor& x, const Tensor& weight, double eps, const Tensor& joint, int64_t first) {
  Tensor out = joint.narrow(1, first, x.size(1));
  if (weight.defined())
    rms_norm(x, weight, eps, out);
  else
    out.copy_(x);
}

// Fills dx from its tokens of the joint gradient; returns that of the weight.
Tensor back(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps, Tensor& dx, int64_t first) {
  if (!grad.defined()) {
    dx.zero_();
    return {};
  }
  const Tensor dy = grad.narrow(1, first, x.size(1));
  if (weight.defined()) return rms_norm_backward(dy, x, weight, eps, dx);
  dx.copy_(dy);
  return {};
}

struct LayoutFunction : Function<LayoutFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, int64_t codes, int64_t count, double eps) {
    ctx->save_for_backward(tensors.vec());
    ctx->saved_data["codes"] = codes;
    ctx->saved_data["count"] = count;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    auto [q, k, v] = join(parse(tensors, codes, count), eps);
    return {q, k, v};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto streams = parse(saved, ctx->saved_data["codes"].toInt(), ctx->saved_data["count"].toInt());
    const double eps = ctx->saved_data["eps"].toDouble();
    bool batched = false;
    for (const Tensor& grad : grads) batched |= grad.defined() && !plain(grad);
    variable_list made;
    {
      const at::NoGradGuard no_graph;
      made = batched ? join_backward_by_pytorch(grads, streams, eps) : join_backward(std::move(grads), streams, eps);
    }
    made = once(std::move(made));
    made.resize(saved.size() + 3);
    return made;
  }

  // Of gradients that kernels cannot read: those of a batch of backwards.
  static variable_list join_backward_by_pytorch(const variable_list& grads, const std::vector<Stream>& streams,
                                                double eps) {
    variable_list made;
    int64_t asked = 0, seen = 0;
    for (const Stream& s : streams) {
      StreamGradients g;
      const int64_t length = s.k.size(1);
      const auto part = [&](int i, int64_t first, const Tensor& x) {
        return grads[i].defined() ? grads[i].narrow(1, first, length) : at::zeros_like(x);
      };
      const auto of = [&](const Tensor& dy, const Tensor& x, const Tensor& weight, Tensor& dweight) {
        if (!weight.defined()) return dy;
        const Tensor wide = x.to(at::kFloat), up = dy.to(at::kFloat);
        const Tensor rstd = (wide.square().mean(-1, true) + eps).rsqrt(), hat = wide * rstd, g = up * weight.to(at::kFloat);
        dweight = (up * hat).sum(at::IntArrayRef{0, 1, 2}).to(weight.scalar_type());
        return (rstd * (g - hat * (g * hat).mean(-1, true))).to(x.scalar_type());
      };
      if (s.asks) g.q = of(part(0, asked, s.q), s.q, s.q_weight, g.q_weight);
      if (s.q.defined() && !s.asks) g.q = at::zeros_like(s.q);
      g.k = of(part(1, seen, s.k), s.k, s.k_weight, g.k_weight);
      g.v = part(2, seen, s.v);
      if (s.packed.defined()) {
        variable_list parts{g.k, g.v};
        if (g.q.defined()) parts.insert(parts.begin(), g.q);
        g.packed = at::stack(parts, 2);
      }
      asked += s.asks ? length : 0;
      seen += length;
      append(made, s, g);
    }
    return made;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> join(const std::vector<Stream>& streams, double eps) {
  int64_t asked = 0, seen = 0;
  for (const Stream& s : streams) {
    seen += s.k.size(1);
    if (s.asks) asked += s.k.size(1);
  }
  const auto made = [&](int64_t n) {
    const Tensor& k = streams[0].k;
    return at::empty({k.size(0), n, k.size(2), k.size(3)}, k.options());
  };
  Tensor q = made(asked), k = made(seen), v = made(seen);
  asked = seen = 0;
  for (const Stream& s : streams) {
    if (s.asks) {
      place(s.q, s.q_weight, eps, q, asked);
      asked += s.k.size(1);
    }
    place(s.k, s.k_weight, eps, k, seen);
    place(s.v, Tensor(), eps, v, seen);
    seen += s.k.size(1);
  }
  return {q, k, v};
}

variable_list join_backward(variable_list grads, const std::vector<Stream>& streams, double eps) {
  for (Tensor& grad : grads)
    if (grad.defined()) grad = unit(grad);
  variable_list made;
  int64_t asked = 0, seen = 0;
  for (const Stream& s : streams) {
    StreamGradients g = empty_gradients(s);
    if (s.asks) {
      g.q_weight = back(grads[0], s.q, s.q_weight, eps, g.q, asked);
      asked += s.k.size(1);
    }
    g.k_weight = back(grads[1], s.k, s.k_weight, eps, g.k, seen);
    back(grads[2], s.v, Tensor(), eps, g.v, seen);
    seen += s.k.size(1);
    append(made, s, g);
  }
  return made;
}

std::tuple<Tensor, Tensor> rectified_flow(const Tensor& x0, const Tensor& noise, const Tensor& t) {
  if (!wants_gradient({&x0, &noise, &t})) return flow(x0, noise, t, false);
  auto made = FlowFunction::apply(x0, noise, t);
  return {made[0], made[1]};
}

Tensor weighted_mse(const Tensor& prediction, const Tensor& target, const Tensor& weight) {
  if (!wants_gradient({&prediction, &target, &weight}))
    return ErrorFunction::of(ErrorFunction::errors_of(prediction, target), weight, prediction.numel());
  return ErrorFunction::apply(prediction, target, weight);
}

Tensor patch_embed(const Tensor& latent, const Tensor& weight, const Maybe& bias, const Tensor& positions, int64_t size,
                   ScalarType type) {
  return EmbedFunction::apply(latent, weight.contiguous(), bias, positions, size, type);
}

Tensor patch_unembed(const Tensor& x, const Tensor& weight, const Maybe& bias, int64_t height, int64_t width,
                     int64_t size) {
  return UnembedFunction::apply(x, weight, bias, height, width, size);
}

std::tuple<Tensor, Tensor, Tensor> joint_layout(const std::vector<Stream>& streams, double eps) {
  const Flat flat = flatten(streams);
  auto made = LayoutFunction::apply(at::TensorList(flat.tensors), flat.codes, flat.count, eps);
  return {made[0], made[1], made[2]};
}

}  // namespace rfkernels::on_cpu
