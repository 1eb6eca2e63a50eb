// Entry points of the ops that have native code on a CPU only.
#include "../ops/entries.h"
#include "functions.h"

namespace rfkernels {
namespace {

// A contiguous tensor that an op of samples takes, or null.
const Tensor* samples(PyObject* object, Op op) {
  const Tensor* x = tensor(object);
  return x && x->is_cpu() && choices[op].cpu && x->dim() && x->numel() ? x : nullptr;
}

// [B] as fp32: what stands once a sample may be fp64, and is read as fp32. Undefined for anything else.
Tensor per_sample(PyObject* object, const Tensor& x) {
  if (!THPVariable_CheckExact(object)) return {};
  const Tensor& t = THPVariable_Unpack(object);
  if (!plain(t) || !at::isFloatingType(t.scalar_type()) || t.dim() != 1 || t.size(0) != x.size(0) ||
      t.device() != x.device())
    return {};
  return t.to(at::kFloat).contiguous();
}

// x0, noise, t
PyObject* py_rectified_flow(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *x0 = samples(a[0], kFlow), *noise = samples(a[1], kFlow);
  const Tensor t = x0 ? per_sample(a[2], *x0) : Tensor();
  if (!t.defined() || THPVariable_Unpack(a[2]).element_size() < 4 || !noise || noise->sizes() != x0->sizes() || noise->scalar_type() != x0->scalar_type() || watched())
    return not_here();
  return wrap(unlocked([&] { return on_cpu::rectified_flow(*x0, *noise, t); }));
  END_HANDLE_TH_ERRORS
}

// prediction, target, weight
PyObject* py_weighted_mse(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *prediction = samples(a[0], kError), *target = samples(a[1], kError);
  const Tensor weight = prediction ? per_sample(a[2], *prediction) : Tensor();
  if (!weight.defined() || !target || target->sizes() != prediction->sizes() || watched()) return not_here();
  return wrap(unlocked([&] { return on_cpu::weighted_mse(*prediction, *target, weight); }));
  END_HANDLE_TH_ERRORS
}

// latent, weight, bias, positions, patch_size, dtype
PyObject* py_patch_embed(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *latent = samples(a[0], kEmbed), *weight = tensor(a[1]), *positions = tensor(a[3]);
  const int64_t p = whole(a[4]);
  ScalarType type = latent ? latent->scalar_type() : at::kFloat;
  if (!latent || !weight || !positions || p < 1 || latent->dim() != 4 || weight->dim() != 4 || watched() ||
      autocasting(*latent) || !weight->is_cpu() || weight->scalar_type() != type || weight->size(1) != latent->size(1) ||
      weight->size(2) != p || weight->size(3) != p || latent->size(2) % p || latent->size(3) % p ||
      !result_type(a[5], *latent, type, type))
    return not_here();
  const int64_t tokens = latent->size(2) / p * (latent->size(3) / p), n = weight->size(0);
  Maybe bias;
  if (a[2] != Py_None) {
    const Tensor* given = of_size(a[2], n, *latent);
    if (!given || given->scalar_type() != weight->scalar_type()) return not_here();
    bias = *given;
  }
  Tensor table = positions->dim() == 3 && positions->size(0) == 1 ? positions->squeeze(0) : *positions;
  if (!table.is_cpu() || table.dim() != 2 || table.size(0) != tokens || table.size(1) != n || !n) return not_here();
  return wrap(unlocked([&] { return on_cpu::patch_embed(*latent, *weight, bias, table, p, type); }));
  END_HANDLE_TH_ERRORS
}

// streams, eps -> joint q, k, v
PyObject* py_joint_layout(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  std::vector<Stream> streams;
  if (watched() || !streams_of(a[0], streams) || !streams[0].k.is_cpu()) return not_here();
  bool asked = false;
  for (const Stream& s : streams) asked |= s.asks;
  if (!asked || (streams.size() == 1 && !streams[0].q_weight.defined() && !streams[0].k_weight.defined()))
    return not_here();                                     // nothing to write: one stream as it is
  const double eps = PyFloat_AsDouble(a[1]);
  const auto [q, k, v] = unlocked([&] { return on_cpu::joint_layout(streams, eps); });
  return PyTuple_Pack(3, THPObjectPtr(wrap(q)).get(), THPObjectPtr(wrap(k)).get(), THPObjectPtr(wrap(v)).get());
  END_HANDLE_TH_ERRORS
}

// x, weight, bias, height, width, patch_size
PyObject* py_patch_unembed(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor* x = samples(a[0], kUnembed);
  Tensor weight;
  Maybe bias;
  const int64_t height = whole(a[3]), width = whole(a[4]), p = whole(a[5]);
  if (!x || x->dim() != 3 || !height || !width || !p || p > 32768 || watched() || autocasting(*x) ||
      !layer(a[1], a[2], *x, x->size(2), weight, bias))
    return not_here();
  if (height % p || width % p || weight.size(0) % (p * p) || !weight.size(0) ||
      x->size(1) != height / p * (width / p))
    return not_here();
  return wrap(unlocked([&] { return on_cpu::patch_unembed(*x, weight, bias, height, width, p); }));
  END_HANDLE_TH_ERRORS
}

// weight, gradient, first, second, their scales or None, (lr, beta1, beta2, 1 - beta1, 1 - beta2, 1 - beta1^step,
// 1 - beta2^step, eps, 1 - lr * weight_decay), scale of the gradient or None, key, first row
PyObject* py_adamw(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  std::array<Tensor, 4> t;
  for (int i = 0; i < 4; ++i) t[i] = THPVariable_Unpack(a[i]);
  Maybe scales[2];
  for (int i = 0; i < 2; ++i)
    if (a[4 + i] != Py_None) scales[i] = THPVariable_Unpack(a[4 + i]);
  AdamW how{};
  float* const numbers[] = {&how.lr,    &how.beta1,  &how.beta2, &how.rest1, &how.rest2,
                            &how.first, &how.second, &how.eps,   &how.decay};
  for (Py_ssize_t i = 0; i < 9; ++i) *numbers[i] = static_cast<float>(PyFloat_AsDouble(PyTuple_GET_ITEM(a[6], i)));
  how.scaled = a[7] != Py_None;
  how.grad_scale = how.scaled ? static_cast<float>(PyFloat_AsDouble(a[7])) : 1.f;
  how.key = static_cast<uint32_t>(PyLong_AsUnsignedLongLong(a[8]));
  const int64_t first_row = PyLong_AsLongLong(a[9]);
  if (PyErr_Occurred()) return nullptr;
  unlocked([&] { on_cpu::adamw(how, first_row, t[0], t[1], t[2], t[3], scales[0], scales[1]); return 0; });
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef cpu_methods[] = {
    FAST(rectified_flow), FAST(weighted_mse), FAST(patch_embed),
    FAST(patch_unembed),  FAST(joint_layout), FAST(adamw), {nullptr, nullptr, 0, nullptr},
};

}  // namespace rfkernels
