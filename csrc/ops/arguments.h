// Arguments of the entry points: whether they are what an op computes on as they are. What is not goes to Python, whose
// checks know every other case and say what is wrong.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>

#include "autograd.h"
#include "streams.h"

namespace rfkernels {

// Throws Python's error, which then belongs to the exception: another thread may catch it.
[[noreturn]] inline void raise() {
  python_error error;
  error.persist();
  throw error;
}

// An int from 1 to 2^31, or 0 for anything else.
inline int64_t whole(PyObject* object) {
  if (!PyLong_CheckExact(object)) return 0;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow || value < 1 || value > (int64_t{1} << 31) ? 0 : value;
}

inline bool is_float(ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }

// A plain floating-point tensor, exactly of type Tensor or Parameter; null for anything else.
inline const Tensor* tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_float(t.scalar_type()) && plain(t) ? &t : nullptr;
}

// [B, S, C], something in it, channels next to each other.
inline const Tensor* tokens(PyObject* object) {
  const Tensor* x = tensor(object);
  return x && x->dim() == 3 && x->numel() && x->stride(2) == 1 ? x : nullptr;
}

// A modulation vector for x as [B, C], [B, S, C] or [C], or None; false for what is none. See checks.canonical.
inline bool vector(PyObject* object, const Tensor& x, Maybe& out) {
  if (object == Py_None) return true;
  const Tensor* v = tensor(object);
  if (!v || v->device() != x.device() || !v->dim() || v->stride(-1) != 1 || v->size(-1) != x.size(2)) return false;
  const int64_t batch = x.size(0), length = x.size(1), rank = v->dim();
  if (rank == 1 || (rank == 2 && v->size(0) == batch) ||
      (rank == 3 && v->size(0) == batch && v->size(1) == length)) {
    out = *v;
  } else if (rank == 2 && v->size(0) == 1) {
    out = v->select(0, 0);
  } else if (rank == 3 && v->size(1) == 1 && (v->size(0) == batch || v->size(0) == 1)) {
    out = v->size(0) == batch ? v->select(1, 0) : v->select(1, 0).select(0, 0);
  } else if (rank == 3 && v->size(0) == 1 && v->size(1) == length) {
    out = v->expand({batch, length, x.size(2)});
  } else {
    return false;
  }
  return true;
}

// [n] on x's device.
inline const Tensor* of_size(PyObject* object, int64_t n, const Tensor& x) {
  const Tensor* t = tensor(object);
  return t && t->dim() == 1 && t->size(0) == n && t->device() == x.device() ? t : nullptr;
}

inline bool is_text(PyObject* object, const char* text) {
  return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

// norm and eps of the adaLN family.
inline bool settings(PyObject* plus_one, PyObject* norm, PyObject* eps, Modulated& out) {
  out.plus_one = plus_one == Py_True;
  out.rms = is_text(norm, "rms");
  if (!out.rms && !is_text(norm, "layer")) return false;
  if (!PyFloat_CheckExact(eps)) return false;
  out.eps = PyFloat_AS_DOUBLE(eps);
  return out.eps > 0;
}

// The dtype asked for; of None autocast's where it is on, else `otherwise`.
inline bool result_type(PyObject* object, const Tensor& x, ScalarType otherwise, ScalarType& out) {
  if (object == Py_None) {
    const auto device = x.device().type();
    out = at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device) : otherwise;
  } else if (THPDtype_Check(object)) {
    out = reinterpret_cast<THPDtype*>(object)->scalar_type;
  } else {
    return false;
  }
  return is_float(out);
}

inline PyObject* wants_sums_name() {
  static PyObject* const name = PyUnicode_InternFromString("_bias_wants_sums");
  return name;
}

// Whether rfkernels.bias marked a tensor.
inline bool wants_sums(PyObject* object) {
  PyObject** dict = _PyObject_GetDictPtr(object);
  return dict && *dict && PyDict_GetItem(*dict, wants_sums_name()) == Py_True;
}

// A packed projection with its norms' weights that a Stream can hold as they are.
inline bool is_packed(PyObject* object, PyObject* q_weight, PyObject* k_weight, bool queries) {
  const Tensor* t = tensor(object);
  if (!t || t->dim() != 5 || (t->size(2) != 3 && (queries || t->size(2) != 2))) return false;
  const auto device = t->device().type();
  if (t->stride(4) != 1) return false;
  if (at::autocast::is_autocast_enabled(device) && t->scalar_type() != at::autocast::get_autocast_dtype(device))
    return false;
  for (PyObject* weight : {q_weight, k_weight})
    if (weight != Py_None && !of_size(weight, t->size(4), *t)) return false;
  return true;
}

// A rfkernels.Stream, without a rotary embedding; false if it is not what kernels read as it is.
inline bool stream_of(PyObject* object, Stream& out, bool* marked) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("packed_tensor"), PyUnicode_InternFromString("_parts"),
      PyUnicode_InternFromString("q_weight"),      PyUnicode_InternFromString("k_weight"),
      PyUnicode_InternFromString("lengths"),       PyUnicode_InternFromString("rope"),
      PyUnicode_InternFromString("queries")};
  std::array<THPObjectPtr, 7> held;
  for (size_t i = 0; i < 7; ++i) {
    held[i] = THPObjectPtr(PyObject_GetAttr(object, names[i]));
    if (!held[i]) {                                        // no Stream
      PyErr_Clear();
      return false;
    }
  }
  const auto optional = [](PyObject* given, Tensor& to) {
    if (given == Py_None) return true;
    const Tensor* t = tensor(given);
    if (t) to = *t;
    return t != nullptr;
  };
  out.asks = PyObject_IsTrue(held[6].get()) == 1;
  if (held[5].get() != Py_None || !optional(held[2].get(), out.q_weight) || !optional(held[3].get(), out.k_weight))
    return false;
  if (held[4].get() != Py_None) {
    if (!THPVariable_CheckExact(held[4].get())) return false;
    out.lengths = THPVariable_Unpack(held[4].get());
  }
  if (held[0].get() != Py_None) {
    if (!optional(held[0].get(), out.packed) || out.packed.dim() != 5) return false;
    *marked = wants_sums(held[0].get());
    unpack(out.packed, out.q, out.k, out.v);
    return out.packed.stride(-1) == 1;
  }
  PyObject* parts = held[1].get();
  if (!PyTuple_CheckExact(parts) || PyTuple_GET_SIZE(parts) != 3) return false;
  return optional(PyTuple_GET_ITEM(parts, 0), out.q) && optional(PyTuple_GET_ITEM(parts, 1), out.k) &&
         optional(PyTuple_GET_ITEM(parts, 2), out.v) && out.k.defined() && out.v.defined();
}

// Streams, a list or tuple of at most four; false if there is something for Python to see to.
// summed: whether all are whole packed projections whose layers take the sums of their gradients.
inline bool streams_of(PyObject* object, std::vector<Stream>& out, bool* summed = nullptr) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  if (PySequence_Fast_GET_SIZE(object) > static_cast<Py_ssize_t>(kMostStreams)) return false;
  out.resize(PySequence_Fast_GET_SIZE(object));
  bool all = true;
  for (size_t i = 0; i < out.size(); ++i) {
    bool marked = false;
    if (!stream_of(PySequence_Fast_GET_ITEM(object, static_cast<Py_ssize_t>(i)), out[i], &marked) || !out[i].k.numel())
      return false;
    all = all && marked && out[i].asks && out[i].packed.size(2) == 3;
  }
  if (summed) *summed = all;
  return !out.empty();
}

}  // namespace rfkernels
