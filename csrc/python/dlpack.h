// SPDX-License-Identifier: Apache-2.0
// The memory layout of DLPack's capsules (https://dmlc.github.io/dlpack), as far as csrc/python/arrays.h reads them.
// A capsule named "dltensor" holds a Managed, one named "dltensor_versioned" a ManagedVersioned.
#pragma once

#include <cstdint>

namespace pycore::python::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };
inline constexpr uint32_t kMajorVersion = 1;
inline constexpr uint64_t kReadOnlyFlag = 1, kCopiedFlag = 2;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dims;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major
  uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

}  // namespace pycore::python::dlpack
