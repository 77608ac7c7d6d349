// SPDX-License-Identifier: Apache-2.0
// What both faces know about a tensor, with neither torch nor pybind11 in sight.
#pragma once

#include <cstdint>

namespace pycore {

enum class DType : int32_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt64,
  kUInt8,
  kUInt16,
  kBool,
  kInt8,
  kInt16,
  kUInt32,
  kUInt64,
  kOther
};
enum class Device : int32_t { kCpu, kCuda, kOther };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kUInt8: return "uint8";
    case DType::kUInt16: return "uint16";
    case DType::kBool: return "bool";
    case DType::kInt8: return "int8";
    case DType::kInt16: return "int16";
    case DType::kUInt32: return "uint32";
    case DType::kUInt64: return "uint64";
    case DType::kOther: break;
  }
  return "an unsupported dtype";
}

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  Device device = Device::kCpu;
  int32_t device_index = 0;
  int32_t dims = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  bool defined() const { return dims >= 0 && dtype != DType::kOther; }
  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }
  // Row-major without gaps. Strides of dimensions of one element, and of no elements at all, mean nothing.
  bool contiguous() const {
    int64_t stride = 1;
    for (int i = dims - 1; i >= 0; stride *= shape[i--]) {
      if (shape[i] > 1 && strides[i] != stride) return count() == 0;
    }
    return true;
  }
  bool last_contiguous() const { return dims == 0 || strides[dims - 1] == 1 || shape[dims - 1] <= 1 || count() == 0; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device == b.device && a.device_index == b.device_index;
}

}  // namespace pycore
