// SPDX-License-Identifier: Apache-2.0
// One function per op family, each defined in csrc/python/<stem>.cpp and called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace pycore::python {

// Weak until every family has its file: module.cpp calls those that are there.
#define PYCORE_BINDINGS __attribute__((weak))
PYCORE_BINDINGS void register_attention(pybind11::module_& m);
PYCORE_BINDINGS void register_linear(pybind11::module_& m);

}  // namespace pycore::python
