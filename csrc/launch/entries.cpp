// Entry points of what is launched here, and what the launcher asks Python.
#include "../ops/entries.h"
#include "attention.h"
#include "launch.h"
#include "../lt/lt.h"
#include "modules.h"

namespace rfkernels {
namespace {

PyObject* compile_callable = nullptr;
PyObject* settings_callable = nullptr;

THPObjectPtr owned(PyObject* object) {
  if (!object) raise();
  return THPObjectPtr(object);
}

PyObject* python_of(const launch::Value& value) {
  using launch::Value;
  switch (value.kind) {
    case Value::kTensor: return THPVariable_Wrap(*value.tensor);
    case Value::kInteger: return PyLong_FromLongLong(value.integer);
    case Value::kReal: return PyFloat_FromDouble(value.real);
    case Value::kTruth: return PyBool_FromLong(value.integer);
    case Value::kText: return PyUnicode_FromString(value.text);
    default: return Py_NewRef(Py_None);
  }
}

// The arguments up to the end of a tuple, or of all of them.
THPObjectPtr tuple_of(const launch::Value*& at, const launch::Value* end) {
  THPObjectPtr items = owned(PyList_New(0));
  for (; at != end && at->kind != launch::Value::kClose; ++at) {
    THPObjectPtr item = at->kind == launch::Value::kOpen ? tuple_of(++at, end) : owned(python_of(*at));
    if (PyList_Append(items.get(), item.get()) < 0) raise();
  }
  return owned(PyList_AsTuple(items.get()));
}

launch::Compiled compile(const launch::Call& call) {
  pybind11::gil_scoped_acquire acquire;
  const launch::Value* at = call.begin();
  THPObjectPtr arguments = tuple_of(at, call.end()), constants = owned(PyDict_New());
  for (auto it = call.constants_begin(); it != call.constants_end(); ++it)
    if (PyDict_SetItemString(constants.get(), it->name, owned(python_of(it->value)).get()) < 0) raise();
  THPObjectPtr made = owned(PyObject_CallFunction(compile_callable, "ssOO", call.kernel().module, call.kernel().name,
                                                  arguments.get(), constants.get()));
  launch::Compiled found;
  unsigned long long function = 0;
  const char* takes = nullptr;
  if (!PyArg_ParseTuple(made.get(), "KIIs", &function, &found.threads, &found.shared, &takes)) raise();
  found.function = reinterpret_cast<void*>(function);
  found.takes = takes;
  return found;
}

std::vector<int64_t> ask_settings(const char* name, int64_t size, const Tensor& like) {
  pybind11::gil_scoped_acquire acquire;
  THPObjectPtr tensor = owned(THPVariable_Wrap(like));
  THPObjectPtr made = owned(PyObject_CallFunction(settings_callable, "sLO", name, static_cast<long long>(size),
                                                  tensor.get()));
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(made.get()); ++i)
    found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(made.get(), i)));
  if (PyErr_Occurred()) raise();
  return found;
}

// compile(module, kernel, arguments, constants), settings(name, size, like)
PyObject* py_on_launch(PyObject*, Arguments a, Py_ssize_t) {
  Py_XSETREF(compile_callable, Py_NewRef(a[0]));
  Py_XSETREF(settings_callable, Py_NewRef(a[1]));
  launch::compile_in_python = compile;
  launch::settings_in_python = ask_settings;
  Py_RETURN_NONE;
}

// device, path of the binary
PyObject* py_cuda_binary(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const char* path = PyUnicode_AsUTF8(a[1]);
  if (!path) return nullptr;
  launch::binary_for(static_cast<int>(PyLong_AsLong(a[0])), path);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// path of the library; for tests
PyObject* py_use_cublaslt(PyObject*, Arguments a, Py_ssize_t) {
  const char* path = PyUnicode_AsUTF8(a[0]);
  if (!path) return nullptr;
  lt::use(path);
  Py_RETURN_NONE;
}

PyObject* py_forget(PyObject*, Arguments, Py_ssize_t) {
  launch::forget();
  Py_RETURN_NONE;
}

// streams, scale, eps -> one tensor for each stream, None for one that does not ask
PyObject* py_joint_attention(PyObject*, Arguments a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  std::vector<Stream> streams;
  bool bias = true;
  if (watched() || !PyFloat_CheckExact(a[2]) || !streams_of(a[0], streams, &bias)) return not_here();
  const Implementation* by = chosen(kJointAttention, streams[0].k);
  const double eps = PyFloat_AS_DOUBLE(a[2]);
  if (!by || !(eps > 0) || launch::refuses(streams)) return not_here();
  double scale = 1.0 / std::sqrt(static_cast<double>(streams[0].k.size(3)));
  if (a[1] != Py_None) {
    if (!PyFloat_CheckExact(a[1])) return not_here();
    scale = PyFloat_AS_DOUBLE(a[1]);
  }
  const auto outs = joint_attention(*by, streams, scale, eps, bias);
  THPObjectPtr made = owned(PyTuple_New(static_cast<Py_ssize_t>(streams.size())));
  size_t next = 0;
  for (size_t i = 0; i < streams.size(); ++i)
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i),
                     streams[i].asks ? wrap(outs[next++]) : Py_NewRef(Py_None));
  return made.release();
  END_HANDLE_TH_ERRORS
}

// qkv, q_weight, k_weight, queries -> bool
PyObject* py_is_packed(PyObject*, Arguments a, Py_ssize_t) {
  return PyBool_FromLong(is_packed(a[0], a[1], a[2], PyObject_IsTrue(a[3]) == 1));
}

}  // namespace

PyMethodDef launch_methods[] = {
    FAST(on_launch),       FAST(cuda_binary), FAST(use_cublaslt),           FAST(forget),
    FAST(joint_attention), FAST(is_packed),   {nullptr, nullptr, 0, nullptr},
};

}  // namespace rfkernels
