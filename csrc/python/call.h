// SPDX-License-Identifier: Apache-2.0
// What every kernel call of the pybind11 face needs beside its arrays: scratch, a Status as an exception, and results
// where the kernel can write them.
#pragma once

#include <pycore/checks.h>
#include <pycore/status.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"

namespace pycore::python {

struct AlignedScratch {
  explicit AlignedScratch(int64_t bytes)
      : memory(bytes > 0 ? new char[static_cast<size_t>(bytes + 63)] : nullptr),
        data(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64)) {}
  std::unique_ptr<char[]> memory;
  void* data;
};

inline void throw_if(const Status& status, const char* op) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

// A contiguous result: `out` if given, or a new array (on the CPU).
inline Array contiguous_result(const py::handle& out, DType dtype, const std::vector<int64_t>& shape, Device device,
                               const char* op, const char* argument, int64_t stream = 0) {
  Array array = result(out, dtype, shape, device, op, argument, stream);
  int64_t row_major = 1;
  for (int i = array.view.dims - 1; i >= 0 && array.view.count() > 0; --i) {
    check_value(array.view.shape[i] == 1 || array.view.strides[i] == row_major, op, argument, " must be contiguous");
    row_major *= array.view.shape[i];
  }
  return array;
}

inline Array cpu_result(const py::handle& out, DType dtype, const std::vector<int64_t>& shape, const char* op,
                        const char* argument) {
  return contiguous_result(out, dtype, shape, Device::kCpu, op, argument);
}

}  // namespace pycore::python
