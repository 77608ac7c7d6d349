// SPDX-License-Identifier: Apache-2.0
// What every kernel call of the pybind11 face needs beside its arrays: scratch, a Status as an exception, and results
// where the kernel can write them.
#pragma once

#include <pycore/status.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../host/checks.h"
#include "arrays.h"
#include "numbers.h"

namespace pycore::python {

struct AlignedScratch {
  AlignedScratch(const char* op, int64_t bytes, const char* what = "scratch")
      : memory(bytes > 0 && bytes < INT64_MAX - 63 ? new (std::nothrow) char[static_cast<size_t>(bytes + 63)]
                                                   : nullptr),
        data(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64)) {
    if (bytes > 0 && !memory) throw_out_of_memory(op, what, {bytes});
  }
  std::unique_ptr<char[]> memory;
  void* data;
};

// Where a kernel writes that may find a fault half way. The caller's `out` must then be as it was, so it gets the
// result when there is one; a new array is written to as it is.
class Deferred {
 public:
  Deferred(const char* op, const py::handle& out, const TensorView& view)
      : view_(view),
        bytes_(out.is_none() ? 0 : view.count() * dtype_size(view.dtype)),
        memory_(op, bytes_, "room for out") {}
  template <class T>
  T* as() const {
    return static_cast<T*>(bytes_ > 0 ? memory_.data : view_.data);
  }
  void finish() const {
    if (bytes_ > 0) std::memcpy(view_.data, memory_.data, static_cast<size_t>(bytes_));
  }

 private:
  const TensorView& view_;
  int64_t bytes_;
  AlignedScratch memory_;
};

inline void throw_if(const Status& status, const char* op) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

// A contiguous result: `out` if given, or a new array (on the CPU).
inline Array contiguous_result(const py::handle& out, DType dtype, const std::vector<int64_t>& shape, Device device,
                               const char* op, const char* argument, int64_t stream = 0) {
  Array array = result(out, dtype, shape, device, op, argument, stream);
  check_contiguous(op, argument, array.view);
  return array;
}

inline Array cpu_result(const py::handle& out, DType dtype, const std::vector<int64_t>& shape, const char* op,
                        const char* argument) {
  return contiguous_result(out, dtype, shape, Device::kCpu, op, argument);
}

}  // namespace pycore::python
