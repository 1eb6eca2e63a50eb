// The module that Python loads: entry points of the ops, and what they ask Python.
#include "../cpu/cpu.h"
#include "bias.h"
#include "chunks.h"
#include "entries.h"

namespace rfkernels {

std::array<Choice, kOps> choices;

namespace {

// --- the ops ----------------------------------------------------------------------------------------------------------

constexpr int64_t kMostChannels = 16384, kMostRows = (int64_t{1} << 31) - (1 << 16);  // of Triton's kernels

// Of the adaLN family: Triton's kernels hold a row in registers.
const Implementation* for_rows(Op op, const Tensor& x) {
  const Implementation* by = chosen(op, x);
  return by == &launched() && x.size(2) > kMostChannels ? nullptr : by;
}

// x, shift, scale, plus_one, norm, eps, dtype
PyObject* py_adaln(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor* x = tokens(a[0]);
  Maybe shift, scale;
  Modulated how;
  ScalarType type;
  const Implementation* by = x ? for_rows(kAdaln, *x) : nullptr;
  if (!by || watched() || !vector(a[1], *x, shift) || !vector(a[2], *x, scale) ||
      !settings(a[3], a[4], a[5], how) || !result_type(a[6], *x, x->scalar_type(), type))
    return not_here();
  return wrap(unlocked([&] { return adaln(*by, *x, shift, scale, how, type); }));
  END_HANDLE_TH_ERRORS
}

// residual, branch, gate, shift, scale, plus_one, norm, eps, dtype
PyObject* py_gated_adaln(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *x = tokens(a[0]), *branch = tokens(a[1]);
  Maybe gate, shift, scale;
  Modulated how;
  ScalarType type;
  const Implementation* by = x ? for_rows(kGatedAdaln, *x) : nullptr;
  if (!by || !branch || branch->sizes() != x->sizes() || branch->device() != x->device() || watched() ||
      !vector(a[2], *x, gate) || !vector(a[3], *x, shift) || !vector(a[4], *x, scale) ||
      !settings(a[5], a[6], a[7], how) || !result_type(a[8], *x, promoted(*x, *branch, gate), type))
    return not_here();
  const bool bias = wants_sums(a[1]);
  return wrap(unlocked([&] { return gated_adaln(*by, *x, *branch, gate, shift, scale, how, type, bias); }));
  END_HANDLE_TH_ERRORS
}

// residual, branch, gate
PyObject* py_gated_residual(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *x = tokens(a[0]), *branch = tokens(a[1]);
  Maybe gate;
  const Implementation* by = x ? for_rows(kGatedResidual, *x) : nullptr;
  if (!by || !branch || branch->sizes() != x->sizes() || branch->device() != x->device() || watched() ||
      !vector(a[2], *x, gate))
    return not_here();
  return wrap(unlocked([&] { return gated_residual(*by, *x, *branch, gate); }));
  END_HANDLE_TH_ERRORS
}

const Tensor* heads(PyObject* object) {
  const Tensor* x = tensor(object);
  return x && x->dim() == 4 && x->numel() && x->stride(3) == 1 ? x : nullptr;
}

// Whether Triton's kernel holds a row in registers and numbers the rows in 32 bits: see qk_norm/op.py.
bool numbered(const Tensor& x) { return x.size(3) <= 1024 && x.numel() / x.size(3) < kMostRows; }

// q, k, q_weight, k_weight, eps
PyObject* py_qk_norm(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor *q = heads(a[0]), *k = heads(a[1]);
  const Implementation* by = q ? chosen(kQkNorm, *q) : nullptr;
  if (!by || !k || (by == &launched() && !(numbered(*q) && numbered(*k))) || k->scalar_type() != q->scalar_type() || k->device() != q->device() || k->size(3) != q->size(3) ||
      !PyFloat_CheckExact(a[4]) || !(PyFloat_AS_DOUBLE(a[4]) > 0) || watched())
    return not_here();
  const Tensor *q_weight = of_size(a[2], q->size(3), *q), *k_weight = of_size(a[3], q->size(3), *q);
  if (!q_weight || !k_weight) return not_here();
  const double eps = PyFloat_AS_DOUBLE(a[4]);
  return wrap(unlocked([&] { return qk_norm(*by, *q, *k, *q_weight, *k_weight, eps); }));
  END_HANDLE_TH_ERRORS
}

// x, weight, bias, shape, before: the op whose backward gives the sums. On a GPU None where nobody gives any.
PyObject* py_linear(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor* given = tensor(a[0]);
  if (!given || !given->dim() || !given->numel() || !PyTuple_Check(a[3]) || watched()) return not_here();
  const Tensor x = in_autocast(*given);
  Tensor weight;
  Maybe bias;
  const Op before = is_text(a[4], "gated_adaln") ? kGatedAdaln : kJointAttention;
  if (!layer(a[1], a[2], x, x.size(-1), weight, bias)) return not_here();
  const Implementation* sums = bias && at::GradMode::is_enabled() && bias->requires_grad() ? chosen(before, x) : nullptr;
  if (!sums && !(x.is_cpu() && choices[kGeluMlp].cpu == &cpu())) return not_here();
  c10::SmallVector<int64_t, 4> shape;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a[3]); ++i) {
    shape.push_back(whole(PyTuple_GET_ITEM(a[3], i)));
    if (!shape.back()) return not_here();
  }
  const Cast cast(x);
  PyObject* out = wrap(unlocked([&] { return linear(sums ? *sums : cpu(), x, weight, bias, shape); }));
  return sums ? marked(out) : out;
  END_HANDLE_TH_ERRORS
}

// x, w1, b1, w2, b2
PyObject* py_gelu_mlp(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor* given = tensor(a[0]);
  const Implementation* by = given ? chosen(kGeluMlp, *given) : nullptr;
  if (!by || !given->dim() || !given->numel() || watched()) return not_here();
  const Tensor x = in_autocast(*given);
  Tensor w1, w2;
  Maybe b1, b2;
  if (!layer(a[1], a[2], x, x.size(-1), w1, b1) || !layer(a[3], a[4], x, w1.size(0), w2, b2)) return not_here();
  const auto wanted = [](const Maybe& t) { return at::GradMode::is_enabled() && t && t->requires_grad(); };
  const bool graph = wants_gradient({&x, &w1, &w2}) || wanted(b1) || wanted(b2);
  if (!graph && !x.is_cpu()) return not_here();            // cuBLASLt has an epilogue for it: fused.without_gradient
  const Cast cast(x);
  PyObject* out = wrap(unlocked([&] { return gelu_mlp(*by, x, w1, b1, w2, b2); }));
  return wanted(b2) ? marked(out) : out;
  END_HANDLE_TH_ERRORS
}

// modulation, count
PyObject* py_chunk_modulation(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor* m = tensor(a[0]);
  const int64_t count = whole(a[1]);
  if (!m || !chosen(kAdaln, *m) || count < 1 || m->dim() < 2 || m->dim() > 3 || (m->dim() == 3 && m->size(1) != 1) ||
      !m->numel() || m->size(-1) % count || !m->is_contiguous() || !wants_gradient({m}) || watched())
    return not_here();
  return THPVariable_WrapList(chunk_modulation(*m, count));
  END_HANDLE_TH_ERRORS
}

// --- gradients of biases ----------------------------------------------------------------------------------------------

PyObject* py_give(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Tensor gradient = THPVariable_Unpack(a[0]), sums = THPVariable_Unpack(a[1]);
  unlocked([&] { give_sums(gradient, sums); });             // the two locks are never held together
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_take(PyObject*, PyObject* gradient) {
  HANDLE_TH_ERRORS
  const Tensor of = THPVariable_Unpack(gradient);
  const Tensor sums = unlocked([&] { return take_sums(of); });
  if (!sums.defined()) Py_RETURN_NONE;
  return wrap(sums);
  END_HANDLE_TH_ERRORS
}

// --- what runs --------------------------------------------------------------------------------------------------------

// op, what runs for tensors on a CPU, on a GPU: None (the Python side decides), "native" or "triton"
PyObject* py_choose(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto by = [](PyObject* name) -> const Implementation* {
    return is_text(name, "native") ? &cpu() : is_text(name, "triton") ? &launched() : nullptr;
  };
  for (size_t op = 0; op < kOps; ++op)
    if (is_text(a[0], kNames[op])) choices[op] = {by(a[1]), by(a[2])};
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_instructions(PyObject*, PyObject* name) {
  HANDLE_TH_ERRORS
  if (name == Py_None) return PyUnicode_FromString(cpu_kernels().name);
  const char* text = PyUnicode_AsUTF8(name);
  return text ? PyUnicode_FromString(use_instructions(text).c_str()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// --- Python's part in a backward --------------------------------------------------------------------------------------

PyObject* python_of(const Value& value) {
  struct Convert {
    PyObject* operator()(const Tensor& t) const { return t.defined() ? wrap(t) : Py_NewRef(Py_None); }
    PyObject* operator()(int64_t i) const { return PyLong_FromLongLong(i); }
    PyObject* operator()(double d) const { return PyFloat_FromDouble(d); }
    PyObject* operator()(bool b) const { return PyBool_FromLong(b); }
    PyObject* operator()(const std::string& s) const { return PyUnicode_FromString(s.c_str()); }
    PyObject* operator()(ScalarType t) const { return Py_NewRef(reinterpret_cast<PyObject*>(torch::getTHPDtype(t))); }
  };
  return std::visit(Convert(), value);
}

PyObject* backward_callable = nullptr;

variable_list call_backward(const std::string& op, const std::vector<Value>& values) {
  pybind11::gil_scoped_acquire acquire;
  THPObjectPtr args(PyTuple_New(static_cast<Py_ssize_t>(values.size()) + 1));
  if (!args) raise();
  PyTuple_SET_ITEM(args.get(), 0, PyUnicode_FromString(op.c_str()));
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* made = python_of(values[i]);
    if (!made) raise();
    PyTuple_SET_ITEM(args.get(), static_cast<Py_ssize_t>(i) + 1, made);
  }
  THPObjectPtr found(PyObject_CallObject(backward_callable, args.get()));
  if (!found) raise();
  THPObjectPtr items(PySequence_Tuple(found.get()));
  if (!items) raise();
  variable_list gradients;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.get()); ++i) {
    PyObject* item = PyTuple_GET_ITEM(items.get(), i);
    gradients.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
  }
  return gradients;
}

PyObject* py_on_backward(PyObject*, PyObject* callable) {
  Py_XSETREF(backward_callable, Py_NewRef(callable));
  backward_in_python = call_backward;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    FAST(adaln),       FAST(gated_adaln),      FAST(gated_residual), FAST(qk_norm), FAST(linear),
    FAST(gelu_mlp),    FAST(chunk_modulation), FAST(give),           ONE(take),     FAST(choose),
    ONE(instructions), ONE(on_backward),       {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "rfkernels_native", nullptr, -1, methods};

}  // namespace
}  // namespace rfkernels

PyMODINIT_FUNC PyInit_rfkernels_native() {
  PyObject* made = PyModule_Create(&rfkernels::module);
  if (made && (PyModule_AddFunctions(made, rfkernels::cpu_methods) < 0 ||
               PyModule_AddFunctions(made, rfkernels::launch_methods) < 0))
    Py_CLEAR(made);
  return made;
}
