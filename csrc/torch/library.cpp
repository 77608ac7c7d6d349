// SPDX-License-Identifier: Apache-2.0
// pycore._C: importing it registers torch.ops.pycore. Each op family adds its schemas and kernels in a file of its own
// with STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m), so this one never changes when an op is added.
#include <Python.h>
#include <pycore/cpu_isa.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pycore, m) { static_cast<void>(m); }

// The module itself is empty. It exists so that `import pycore._C` loads this library, which runs the registrations.
// Py_LIMITED_API keeps it loadable by every CPython from 3.10 on.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  if (const char* error = pycore::cpu_isa_error()) {
    PyErr_SetString(PyExc_ValueError, error);
    return nullptr;
  }
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
