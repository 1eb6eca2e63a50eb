// What entry points share. One takes an op's arguments as they came and computes, or returns None: then the Python side
// checks, chooses and explains. What runs where is told by `choose`.
#pragma once

#include <Python.h>
#include <torch/csrc/Exceptions.h>

#include "arguments.h"

namespace rfkernels {

using Arguments = PyObject* const*;

enum Op {
  kAdaln, kGatedAdaln, kGatedResidual, kQkNorm, kGeluMlp, kJointAttention, kFlow, kError, kEmbed, kUnembed, kOps
};
inline constexpr std::array<const char*, kOps> kNames{
    "adaln",          "gated_adaln",  "gated_residual", "qk_norm",      "gelu_mlp", "joint_attention",
    "rectified_flow", "weighted_mse", "patch_embed",    "patch_unembed"};

struct Choice {
  const Implementation *cpu = nullptr, *cuda = nullptr;
};
extern std::array<Choice, kOps> choices;

inline const Implementation* chosen(Op op, const Tensor& x) { return x.is_cpu() ? choices[op].cpu : choices[op].cuda; }

inline PyObject* not_here() { Py_RETURN_NONE; }

inline PyObject* wrap(const Tensor& t) { return THPVariable_Wrap(t); }

inline PyObject* wrap(std::tuple<Tensor, Tensor> made) {
  PyObject* both = PyTuple_New(2);
  if (!both) return nullptr;
  PyTuple_SET_ITEM(both, 0, wrap(std::get<0>(made)));
  PyTuple_SET_ITEM(both, 1, wrap(std::get<1>(made)));
  return both;
}

// Computes without the interpreter's lock.
template <typename Function>
auto unlocked(const Function& function) {
  pybind11::gil_scoped_release release;
  return function();
}

inline PyObject* marked(PyObject* object) {
  if (object && PyObject_SetAttr(object, wants_sums_name(), Py_True) < 0) Py_CLEAR(object);
  return object;
}

inline bool autocasting(const Tensor& x) { return at::autocast::is_autocast_enabled(x.device().type()); }

// In autocast's dtype where it is on; of weights by PyTorch's cache of cast ones, so that each is cast once.
inline Tensor in_autocast(const Tensor& t) {
  const auto device = t.device().type();
  return autocasting(t) ? at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device) : t;
}

// Inside, autocast is off on x's device: what is computed on has been cast.
class Cast {
 public:
  explicit Cast(const Tensor& x) : guard_(at::autocast::get_autocast_dispatch_key_from_device_type(x.device().type())) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

// A linear layer's weight [rows, columns] and bias [rows] or None, in autocast's dtype where it is on, which x has; of
// x's dtype in any case.
inline bool layer(PyObject* weight, PyObject* bias, const Tensor& x, int64_t columns, Tensor& w, Maybe& b) {
  const Tensor* given = tensor(weight);
  if (!given || given->dim() != 2 || given->size(1) != columns || given->device() != x.device()) return false;
  w = in_autocast(*given);
  if (w.scalar_type() != x.scalar_type()) return false;
  if (bias == Py_None) return true;
  const Tensor* offset = of_size(bias, w.size(0), x);
  if (!offset) return false;
  b = in_autocast(*offset);
  return b->scalar_type() == x.scalar_type();
}

#define FAST(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_##name)), METH_FASTCALL, nullptr}
#define ONE(name) {#name, py_##name, METH_O, nullptr}

// Entry points of csrc/cpu and csrc/launch.
extern PyMethodDef cpu_methods[];
extern PyMethodDef launch_methods[];

}  // namespace rfkernels
