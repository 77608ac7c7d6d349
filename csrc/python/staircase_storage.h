// SPDX-License-Identifier: Apache-2.0
// The arrays that a side of a staircase cache is kept in, with their views.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../host/staircase_cache_args.h"
#include "arrays.h"

namespace pycore::python {

struct StaircaseStorage {
  StaircaseStorage(const py::sequence& given, bool written, const char* op, const char* argument) {
    check_value(py::len(given) == kStorageTensors, op, argument, " has ", py::len(given), " arrays and must have ",
                kStorageTensors);
    for (const py::handle& each : given) {
      arrays.push_back(written ? output(each, op, argument) : input(each, op, argument));
      views.push_back(arrays.back().view);
    }
  }
  std::vector<Array> arrays;
  std::vector<TensorView> views;
};

}  // namespace pycore::python
