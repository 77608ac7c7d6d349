// SPDX-License-Identifier: Apache-2.0
// Numbers among the arguments: ints of Python and of NumPy, in 64 bits, and no bools. `threads=True` is a slip, and
// what it was meant to say is not `threads=1`.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace pycore::python {

namespace py = pybind11;

inline std::string type_name(const py::handle& object) {
  return py::str(py::type::of(object).attr("__name__")).cast<std::string>();
}

// Python's, or NumPy's, which is "bool" since NumPy 2.
inline bool is_bool(const py::handle& object) {
  if (PyBool_Check(object.ptr())) return true;
  if (PyLong_CheckExact(object.ptr())) return false;
  const std::string name = type_name(object);
  if (name == "bool" || name == "bool_") return true;
  // An array of one bool, NumPy's or torch's, has an index too.
  return py::hasattr(object, "dtype") &&
         py::str(object.attr("dtype")).cast<std::string>().find("bool") != std::string::npos;
}

inline bool is_integer_like(const py::handle& object) {
  return PyLong_CheckExact(object.ptr()) || (PyIndex_Check(object.ptr()) && !is_bool(object));
}

inline int64_t integer(const py::handle& object, const char* op, const char* name) {
  if (!is_integer_like(object)) {
    throw py::type_error(std::string(op) + ": " + name + " is a " + type_name(object) + " and must be an int");
  }
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {  // an array of several, or of floats
    PyErr_Clear();
    throw py::type_error(std::string(op) + ": " + name + " is a " + type_name(object) + " and must be an int");
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    throw std::invalid_argument(std::string(op) + ": " + name + " is " + py::str(index).cast<std::string>() +
                                " and must be " + (overflow > 0 ? "less than 2**63" : "at least -2**63"));
  }
  return value;
}

inline std::optional<int64_t> optional_integer(const py::handle& object, const char* op, const char* name) {
  return object.is_none() ? std::nullopt : std::optional<int64_t>(integer(object, op, name));
}

// A list or tuple of them.
inline std::vector<int64_t> integers(const py::handle& object, const char* op, const char* name) {
  if (!py::isinstance<py::sequence>(object) || py::isinstance<py::str>(object)) {
    throw py::type_error(std::string(op) + ": " + name + " is a " + type_name(object) + ", which it cannot be");
  }
  std::vector<int64_t> out;
  for (const py::handle& each : py::reinterpret_borrow<py::sequence>(object)) out.push_back(integer(each, op, name));
  return out;
}

}  // namespace pycore::python
