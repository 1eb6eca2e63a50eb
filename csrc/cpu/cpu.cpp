// The CPU kernels as functions of tensors: shapes, outputs, threads.
//
// Work is cut into ranges of tokens by shape alone, and partial sums are added in their order, so that results do not
// depend on the number of threads.
#include "cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../ops/chunks.h"
#include "../ops/implementation.h"
#include "functions.h"
#include "kernels.h"

namespace rfkernels {
namespace {

constexpr int64_t kTokens = 32;        // of a range
constexpr int64_t kElements = 1 << 14; // of ranges worth a thread

const Kernels& best() {
#if defined(RFKERNELS_X86)
  static const Kernels& chosen = [] () -> const Kernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return avx512::kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return avx2::kernels;
    return portable::kernels;
  }();
  return chosen;
#else
  return portable::kernels;
#endif
}

const Kernels* chosen = nullptr;

const Kernels& kernels() { return chosen ? *chosen : best(); }

Dtype dtype_of(at::ScalarType type) {
  return type == at::kFloat ? F32 : type == at::kBFloat16 ? BF16 : F16;
}

// [B, S, C], or a modulation vector [B, C], [B, S, C] or [C].
Rows rows(const Tensor& t) {
  Rows made{t.data_ptr(), 0, 0, dtype_of(t.scalar_type())};
  if (t.dim() == 3) made.token = t.stride(1);
  if (t.dim() > 1) made.batch = t.stride(0);
  return made;
}

Rows rows(const Maybe& t) { return t ? rows(*t) : Rows{}; }

struct Shape {
  int64_t batch, length, channels, ranges;
  Shape(int64_t b, int64_t s, int64_t c) : batch(b), length(s), channels(c), ranges((s + kTokens - 1) / kTokens) {}
  explicit Shape(const Tensor& x) : Shape(x.size(0), x.size(1), x.size(2)) {}
  int64_t tasks() const { return batch * ranges; }
};

// body(range, sample, first token, one past the last, scratch) for each range of tokens.
template <typename Body>
void for_ranges(const Shape& shape, int64_t scratch, const Body& body) {
  const int64_t each = std::max<int64_t>(1, std::min(shape.length, kTokens) * shape.channels);
  at::parallel_for(0, shape.tasks(), std::max<int64_t>(1, kElements / each), [&](int64_t first, int64_t last) {
    std::vector<float> room(scratch);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / shape.ranges, begin = i % shape.ranges * kTokens;
      body(i, b, begin, std::min(begin + kTokens, shape.length), room.data());
    }
  });
}

// Partial sums of the gradient of a vector that tokens share, one row a range.
struct Sums {
  Tensor partials;
  const Shape* shape = nullptr;
  bool shared = false;

  Sums(const Maybe& vector, const Shape& over, const Tensor& x) : shape(&over), shared(vector && vector->dim() < 3) {
    if (shared) partials = at::zeros({over.tasks(), over.channels}, x.options().dtype(at::kFloat));
  }
  float* row(int64_t i) const { return shared ? partials.data_ptr<float>() + i * shape->channels : nullptr; }
  // Into the gradient, whose shape says which rows belong together; in order.
  void finish(Tensor& gradient) const {
    if (!shared) return;
    const int64_t channels = shape->channels, groups = gradient.dim() == 2 ? shape->batch : 1;
    const int64_t count = groups ? shape->tasks() / groups : 0;
    Tensor total = gradient.scalar_type() == at::kFloat ? gradient : at::empty(gradient.sizes(), partials.options());
    const int64_t pitch = total.dim() == 2 ? total.stride(0) : 0;      // a chunk's rows lie apart
    const float* in = partials.data_ptr<float>();
    for (int64_t g = 0; g < groups; ++g) {
      float* out = total.data_ptr<float>() + g * pitch;
      std::fill(out, out + channels, 0.f);
      for (int64_t r = 0; r < count; ++r, in += channels)
        for (int64_t c = 0; c < channels; ++c) out[c] += in[c];
    }
    if (!total.is_same(gradient)) gradient.copy_(total);
  }
};

Tensor gradient_like(const Maybe& vector, bool in_chunks) {
  return vector ? gradient_of(*vector, in_chunks) : Tensor();
}

Rows per_token(const Maybe& vector, const Tensor& gradient) {
  return vector && vector->dim() == 3 ? rows(gradient) : Rows{};
}

Norm norm_of(const Shape& shape, const Modulated& how) {
  return {shape.channels, how.rms, how.plus_one ? 1.f : 0.f, static_cast<float>(how.eps)};
}

struct Statistics {
  Tensor both;                                             // [2, B, S]: mean, rstd
  float *mean, *rstd;
  Statistics(const Tensor& given) : both(given), mean(both.data_ptr<float>()), rstd(mean + both.numel() / 2) {}
  Statistics(const Shape& shape, const Tensor& x)
      : Statistics(at::empty({2, shape.batch, shape.length}, x.options().dtype(at::kFloat))) {}
};

// Of adaln, or, with dh, of gated_adaln, x being h.
GatedGradients adaln_gradients(const Tensor& given_dy, const Maybe& given_dh, const Tensor& x, const Maybe& branch,
                               const Maybe& gate, const Maybe& shift, const Maybe& scale, const Tensor& statistics,
                               const Modulated& how, ScalarType type, bool bias, bool in_chunks) {
  const Shape shape(x);
  const Norm norm = norm_of(shape, how);
  const Tensor dy = unit(given_dy);
  const Maybe dh = given_dh ? Maybe(unit(*given_dh)) : given_dh;
  GatedGradients made{fresh(x, type), branch ? fresh(*branch) : Tensor(), gradient_like(gate, in_chunks),
                      gradient_like(shift, in_chunks), gradient_like(scale, in_chunks),
                      bias ? at::empty({shape.channels}, branch->options()) : Tensor()};
  const Sums shifts(shift, shape, x), scales(scale, shape, x), gates(gate, shape, x);
  const Sums biases(bias ? Maybe(made.bias) : Maybe(), shape, x);
  const Statistics known(statistics);
  for_ranges(shape, kScratchRows * shape.channels, [&](int64_t i, int64_t b, int64_t begin, int64_t end, float* room) {
    kernels().adaln_backward(
        norm, b, begin, end, rows(dy), rows(dh), rows(x), rows(branch), rows(gate), rows(scale),
        known.mean + b * shape.length, known.rstd + b * shape.length, rows(made.residual),
        dh ? rows(made.branch) : Rows{}, per_token(shift, made.shift), per_token(scale, made.scale),
        per_token(gate, made.gate), shifts.row(i), scales.row(i), gates.row(i), biases.row(i), room);
  });
  shifts.finish(made.shift);
  scales.finish(made.scale);
  gates.finish(made.gate);
  biases.finish(made.bias);
  return made;
}

// [B, S, H, D] as rows of its first head.
Rows heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), dtype_of(x.scalar_type())}; }

struct Heads : Shape {
  int64_t count, dim;
  explicit Heads(const Tensor& x)
      : Shape(x.size(0), x.size(1), x.size(2) * x.size(3)), count(x.size(2)), dim(x.size(3)) {}
};

}  // namespace

void on_cpu::rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  const Heads shape(x);
  const Tensor w = weight.contiguous();
  for_ranges(shape, shape.dim + 2 * shape.channels, [&](int64_t, int64_t b, int64_t begin, int64_t end, float* room) {
    kernels().rms_norm(b, begin, end, shape.count, shape.dim, static_cast<float>(eps), heads(x), x.stride(2), rows(w),
                       heads(out), room);
  });
}

Tensor on_cpu::rms_norm_backward(const Tensor& given, const Tensor& x, const Tensor& weight, double eps, Tensor& dx) {
  const Heads shape(x);
  const Tensor dy = unit(given), w = weight.contiguous();
  Tensor dw = fresh(w);
  Shape narrow = shape;                                    // sums are of a head's channels
  narrow.channels = shape.dim;
  const Sums sums(w, narrow, x);
  for_ranges(shape, 2 * shape.dim + 3 * shape.channels, [&](int64_t i, int64_t b, int64_t begin, int64_t end, float* room) {
    kernels().rms_norm_backward(b, begin, end, shape.count, shape.dim, static_cast<float>(eps), heads(dy),
                                dy.stride(2), heads(x), x.stride(2), rows(w), heads(dx), sums.row(i), room);
  });
  sums.finish(dw);
  return dw;
}

namespace {

class Cpu : public Implementation {
 public:
  const char* suffix() const override { return "_native"; }

  std::tuple<Tensor, Tensor> adaln(const Tensor& x, const Maybe& shift, const Maybe& scale, const Modulated& how,
                                   ScalarType type) const override {
    const Shape shape(x);
    const Norm norm = norm_of(shape, how);
    Tensor y = fresh(x, type);
    const Statistics made(shape, x);
    for_ranges(shape, kScratchRows * shape.channels, [&](int64_t, int64_t b, int64_t begin, int64_t end, float* room) {
      kernels().adaln(norm, b, begin, end, rows(x), rows(shift), rows(scale), rows(y), made.mean + b * shape.length,
                      made.rstd + b * shape.length, room);
    });
    return {y, made.both};
  }

  std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& dy, const Tensor& x, const Maybe& shift,
                                                    const Maybe& scale, const Tensor& statistics,
                                                    const Modulated& how, bool in_chunks) const override {
    const Maybe no;
    auto made = adaln_gradients(dy, no, x, no, no, shift, scale, statistics, how, x.scalar_type(), false, in_chunks);
    return {made.residual, made.shift, made.scale};
  }

  std::tuple<Tensor, Tensor, Tensor> gated_adaln(const Tensor& residual, const Tensor& branch, const Maybe& gate,
                                                 const Maybe& shift, const Maybe& scale, const Modulated& how,
                                                 ScalarType h_type, ScalarType type) const override {
    const Shape shape(residual);
    const Norm norm = norm_of(shape, how);
    Tensor h = fresh(residual, h_type), y = fresh(residual, type);
    const Statistics made(shape, residual);
    for_ranges(shape, kScratchRows * shape.channels, [&](int64_t, int64_t b, int64_t begin, int64_t end, float* room) {
      kernels().gated_adaln(norm, b, begin, end, rows(residual), rows(branch), rows(gate), rows(shift), rows(scale),
                            rows(h), rows(y), made.mean + b * shape.length, made.rstd + b * shape.length, room);
    });
    return {h, y, made.both};
  }

  GatedGradients gated_adaln_backward(const Tensor& dh, const Tensor& dy, const Tensor& h, const Tensor& branch,
                                      const Maybe& gate, const Maybe& shift, const Maybe& scale,
                                      const Tensor& statistics, const Modulated& how, ScalarType residual, bool bias,
                                      bool in_chunks) const override {
    return adaln_gradients(dy, dh, h, branch, gate, shift, scale, statistics, how, residual, bias, in_chunks);
  }

  Tensor gated_residual(const Tensor& residual, const Tensor& branch, const Maybe& gate,
                        ScalarType type) const override {
    const Shape shape(residual);
    Tensor h = fresh(residual, type);
    for_ranges(shape, kScratchRows * shape.channels, [&](int64_t, int64_t b, int64_t begin, int64_t end, float* room) {
      kernels().gated_residual(shape.channels, b, begin, end, rows(residual), rows(branch), rows(gate), rows(h), room);
    });
    return h;
  }

  std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& given, const Tensor& branch, const Tensor& gate,
                                                     bool in_chunks) const override {
    const Shape shape(branch);
    const Tensor dh = unit(given);
    Tensor dbranch = fresh(branch), dgate = gradient_of(gate, in_chunks);
    const Sums sums(gate, shape, branch);
    for_ranges(shape, kScratchRows * shape.channels, [&](int64_t i, int64_t b, int64_t begin, int64_t end, float* room) {
      kernels().gated_residual_backward(shape.channels, b, begin, end, rows(dh), rows(branch), rows(gate),
                                        rows(dbranch), per_token(gate, dgate), sums.row(i), room);
    });
    sums.finish(dgate);
    return {dbranch, dgate};
  }

  std::tuple<Tensor, Tensor> qk_norm(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                                     double eps) const override {
    Tensor normal_q = fresh(q), normal_k = fresh(k);
    on_cpu::rms_norm(q, q_weight, eps, normal_q);
    on_cpu::rms_norm(k, k_weight, eps, normal_k);
    return {normal_q, normal_k};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& dq, const Tensor& dk, const Tensor& q,
                                                              const Tensor& k, const Tensor& q_weight,
                                                              const Tensor& k_weight, double eps) const override {
    Tensor q_grad = fresh(q), k_grad = fresh(k);
    const Tensor of_q = on_cpu::rms_norm_backward(dq, q, q_weight, eps, q_grad);
    const Tensor of_k = on_cpu::rms_norm_backward(dk, k, k_weight, eps, k_grad);
    return {q_grad, k_grad, of_q, of_k};
  }

  std::tuple<Tensor, Tensor, Tensor> gelu_backward(const Tensor& given_h, const Tensor& given_da, bool value,
                                                   bool bias) const override {
    const Tensor h = given_h.contiguous(), da = given_da.to(h.scalar_type()).contiguous();
    const Shape shape(1, h.size(0), h.size(1));            // one sample of N tokens
    Tensor a = value ? fresh(h) : Tensor(), dh = fresh(h);
    Tensor db = bias ? at::empty({shape.channels}, h.options()) : Tensor();
    const Sums sums(bias ? Maybe(db) : Maybe(), shape, h);
    const Dtype dtype = dtype_of(h.scalar_type());
    const auto of = [&](const Tensor& t, int64_t s) {
      return static_cast<char*>(t.data_ptr()) + s * shape.channels * h.element_size();
    };
    for_ranges(shape, 4 * shape.channels, [&](int64_t i, int64_t, int64_t begin, int64_t end, float* room) {
      for (int64_t s = begin; s < end; ++s)
        kernels().gelu_backward(shape.channels, of(h, s), of(da, s), value ? of(a, s) : nullptr, of(dh, s), dtype,
                                sums.row(i), room);
    });
    sums.finish(db);
    return {a, dh, db};
  }
};

}  // namespace

const Implementation& cpu() {
  static const Cpu made;
  return made;
}

std::string use_instructions(const std::string& name) {
  chosen = nullptr;
  if (name == "portable") chosen = &portable::kernels;
#if defined(RFKERNELS_X86)
  if (name == "avx2") chosen = &avx2::kernels;
  if (name == "avx512") chosen = &avx512::kernels;
#endif
  TORCH_CHECK_VALUE(name.empty() || chosen, "instruction set is '", name, "'; expected one that was built");
  return kernels().name;
}

const Kernels& cpu_kernels() { return kernels(); }

}  // namespace rfkernels
