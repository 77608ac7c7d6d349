// SPDX-License-Identifier: Apache-2.0
// NumPy arrays and DLPack tensors (torch, JAX, CuPy, ...) as views, without a copy. Convert while the GIL is held, then
// release it around the kernel: an Array keeps its memory alive until it goes out of scope.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pycore/tensor_view.h>

#include <string>
#include <utility>
#include <vector>

#include "../host/checks.h"
#include "dlpack.h"

namespace pycore::python {

namespace py = pybind11;

struct Array {
  TensorView view;
  py::object object;   // what the caller passed, or was made for them: what a function returns
  py::object capsule;  // the DLPack capsule that lends the memory; none for NumPy
};

namespace detail {

inline DType numpy_dtype(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '>') return DType::kOther;
  const auto size = dtype.itemsize();
  switch (dtype.kind()) {
    case 'f':
      return size == 4 ? DType::kFloat32 : size == 8 ? DType::kFloat64 : size == 2 ? DType::kFloat16 : DType::kOther;
    case 'i': return size == 4 ? DType::kInt32 : size == 8 ? DType::kInt64 : size == 1 ? DType::kInt8 : DType::kInt16;
    case 'u':
      return size == 1 ? DType::kUInt8 : size == 2 ? DType::kUInt16 : size == 4 ? DType::kUInt32 : DType::kUInt64;
    case 'b': return DType::kBool;
    default: break;
  }
  // The ml_dtypes package gives NumPy a bfloat16.
  return py::str(dtype.attr("name")).cast<std::string>() == "bfloat16" ? DType::kBFloat16 : DType::kOther;
}

inline DType dlpack_dtype(const dlpack::Tensor& tensor) {
  if (tensor.lanes != 1) return DType::kOther;
  switch (tensor.type_code * 256 + tensor.bits) {
    case dlpack::kFloat * 256 + 16: return DType::kFloat16;
    case dlpack::kFloat * 256 + 32: return DType::kFloat32;
    case dlpack::kFloat * 256 + 64: return DType::kFloat64;
    case dlpack::kBFloat * 256 + 16: return DType::kBFloat16;
    case dlpack::kInt * 256 + 8: return DType::kInt8;
    case dlpack::kInt * 256 + 16: return DType::kInt16;
    case dlpack::kInt * 256 + 32: return DType::kInt32;
    case dlpack::kInt * 256 + 64: return DType::kInt64;
    case dlpack::kUInt * 256 + 8: return DType::kUInt8;
    case dlpack::kUInt * 256 + 16: return DType::kUInt16;
    case dlpack::kUInt * 256 + 32: return DType::kUInt32;
    case dlpack::kUInt * 256 + 64: return DType::kUInt64;
    case dlpack::kBool * 256 + 8: return DType::kBool;
    default: return DType::kOther;
  }
}

inline void check_dtype(const TensorView& view, const py::handle& object, const char* op, const char* argument) {
  if (view.dtype != DType::kOther) return;
  const std::string name = py::str(py::getattr(object, "dtype", py::str("unknown"))).cast<std::string>();
  check_value(false, op, argument, " has dtype ", name, ", which no kernel takes");
}

inline Array from_numpy(const py::array& array, bool writable, const char* op, const char* argument) {
  if (Py_TYPE(array.ptr()) != py::detail::npy_api::get().PyArray_Type_ &&
      py::isinstance(array, py::module_::import("numpy.ma").attr("MaskedArray"))) {
    throw py::type_error(std::string(op) + ": " + argument +
                         " is a masked array, whose mask no kernel sees, and must be a plain one: call filled()");
  }
  check_value(!writable || array.writeable(), op, argument, " is written to and must not be a read-only array");
  check_value(array.ndim() <= kMaxDims, op, argument, " has ", array.ndim(), " dimensions and may have ", kMaxDims);
  Array result{{}, array, {}};
  TensorView& view = result.view;
  view.data = const_cast<void*>(array.data());
  view.dtype = numpy_dtype(array);
  check_dtype(view, array, op, argument);
  view.dims = static_cast<int32_t>(array.ndim());
  for (int i = 0; i < view.dims; ++i) {
    view.shape[i] = array.shape(i);
    check_value(array.strides(i) % array.itemsize() == 0, op, argument, " has a stride of ", array.strides(i),
                " bytes, which is no multiple of its ", array.itemsize(), "-byte elements");
    view.strides[i] = array.strides(i) / array.itemsize();
  }
  check_value(reinterpret_cast<uintptr_t>(view.data) % array.itemsize() == 0, op, argument,
              " must be aligned to its elements");
  check_span(op, argument, view);
  return result;
}

// Asks for a versioned capsule, and again without a version where the exporter is older than DLPack 1.0.
inline py::object dlpack_capsule(const py::handle& object, bool cuda, int64_t stream) {
  py::dict arguments;
  if (cuda) arguments["stream"] = stream == 0 ? int64_t{1} : stream;  // DLPack's name for the legacy default stream
  const py::object export_tensor = object.attr("__dlpack__");
  try {
    return export_tensor(py::arg("max_version") = py::make_tuple(dlpack::kMajorVersion, 0), **arguments);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return export_tensor(**arguments);
}

// The capsule is looked into and never consumed: its own destructor frees the tensor, when the Array lets go of it.
inline const dlpack::Tensor& look_into(const py::object& capsule, uint64_t* flags, const char* op,
                                       const char* argument) {
  *flags = 0;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    return static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  }
  check_value(PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned"), op, argument,
              " exports something that is not a DLPack capsule");
  auto* managed = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
  check_value(managed->major == dlpack::kMajorVersion, op, argument, " exports DLPack ", managed->major,
              ", and version ", dlpack::kMajorVersion, " is understood");
  *flags = managed->flags;
  return managed->tensor;
}

inline Array from_dlpack(const py::handle& object, bool writable, const char* op, const char* argument,
                         int64_t stream) {
  Array result{{}, py::reinterpret_borrow<py::object>(object), {}};
  // torch negates such a view when it is read, and exports it as if it were not one.
  check_value(!py::hasattr(object, "is_neg") || !object.attr("is_neg")().cast<bool>(), op, argument,
              " is a view that torch negates when it is read, and must be resolved: call resolve_neg()");
  try {
    const auto device = object.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
    const bool cuda = device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged;
    result.capsule = dlpack_capsule(object, cuda, stream);
  } catch (py::error_already_set& error) {
    const std::string reason = py::str(error.value()).cast<std::string>();
    throw std::invalid_argument(std::string(op) + ": " + argument + " cannot be read through DLPack (" + reason + ")");
  }
  uint64_t flags;
  const dlpack::Tensor& tensor = look_into(result.capsule, &flags, op, argument);
  check_value(!writable || (flags & (dlpack::kReadOnlyFlag | dlpack::kCopiedFlag)) == 0, op, argument,
              " is written to and must be neither read-only nor a copy");
  check_value(tensor.dims <= kMaxDims, op, argument, " has ", tensor.dims, " dimensions and may have ", kMaxDims);
  TensorView& view = result.view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = dlpack_dtype(tensor);
  check_dtype(view, object, op, argument);
  switch (tensor.device_type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost: view.device = Device::kCpu; break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged: view.device = Device::kCuda; break;
    default: view.device = Device::kOther; break;
  }
  check_value(view.device != Device::kOther, op, argument, " must be on a CPU or a CUDA device");
  view.device_index = view.device == Device::kCuda ? tensor.device_id : 0;
  view.dims = tensor.dims;
  int64_t row_major = 1;
  for (int i = view.dims - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : row_major;
    row_major *= tensor.shape[i];
  }
  check_span(op, argument, view);
  check_value(tensor.data != nullptr || view.count() == 0, op, argument, " has no memory and must have some");
  return result;
}

inline Array from_object(const py::handle& object, bool writable, const char* op, const char* argument,
                         int64_t stream) {
  if (py::isinstance<py::array>(object)) {
    return from_numpy(py::reinterpret_borrow<py::array>(object), writable, op, argument);
  }
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
    throw py::type_error(std::string(op) + ": " + argument + " is " +
                         py::str(py::type::of(object).attr("__name__")).cast<std::string>() +
                         " and must be a NumPy array or a DLPack tensor");
  }
  return from_dlpack(object, writable, op, argument, stream);
}

inline const char* numpy_name(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kOther ? nullptr : dtype_name(dtype);
}

inline py::array new_array(DType dtype, const std::vector<int64_t>& shape, const char* op, const char* argument) {
  try {
    return py::array(py::dtype(numpy_name(dtype)), shape);
  } catch (py::error_already_set& error) {
    // A ValueError is what NumPy says of shapes that no memory holds.
    if (!error.matches(PyExc_MemoryError) && !error.matches(PyExc_ValueError)) throw;
    throw_out_of_memory(op, argument, shape);
  }
}

}  // namespace detail

// An argument that is read. `stream` is the CUDA stream the kernel will run on; 0 is the default stream.
inline Array input(const py::handle& object, const char* op, const char* argument, int64_t stream = 0) {
  return detail::from_object(object, false, op, argument, stream);
}

// None gives an Array whose view is not defined().
inline Array optional_input(const py::handle& object, const char* op, const char* argument, int64_t stream = 0) {
  return object.is_none() ? Array{{}, py::none(), {}} : input(object, op, argument, stream);
}

// A table or a list of numbers, or None, as the torch face takes them: a NumPy array whose elements do not lie side by
// side is copied, and so is, with `widen`, one of integers smaller than int64.
inline Array small_input(const py::handle& object, const char* op, const char* argument, int64_t stream, bool widen) {
  const bool plain = Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
  if (!plain || py::reinterpret_borrow<py::array>(object).ndim() == 0) {
    return optional_input(object, op, argument, stream);
  }
  const py::array array = py::reinterpret_borrow<py::array>(object);
  const char kind = array.dtype().kind();
  const bool narrow = widen && (kind == 'i' || kind == 'u') && array.itemsize() < 8;
  if (!narrow && (array.flags() & py::array::c_style) != 0) return optional_input(object, op, argument, stream);
  const py::object copy = py::module_::import("numpy").attr("ascontiguousarray");
  return input(narrow ? copy(array, "int64") : copy(array), op, argument, stream);
}

// An argument that is written to.
inline Array output(const py::handle& object, const char* op, const char* argument, int64_t stream = 0) {
  return detail::from_object(object, true, op, argument, stream);
}

// Where a result goes: `out` if the caller gave one, which must have this dtype and shape, or else a new NumPy array.
inline Array result(const py::handle& out, DType dtype, const std::vector<int64_t>& shape, Device device,
                    const char* op, const char* argument, int64_t stream = 0) {
  if (out.is_none()) {
    check_value(device == Device::kCpu, op, argument, " must be given when the inputs are on a CUDA device");
    check_value(detail::numpy_name(dtype) != nullptr, op, argument, " must be given for ", dtype_name(dtype),
                ", which NumPy does not have");
    return detail::from_numpy(detail::new_array(dtype, shape, op, argument), true, op, argument);
  }
  Array array = output(out, op, argument, stream);
  check_value(array.view.dtype == dtype, op, argument, " is ", dtype_name(array.view.dtype), " and must be ",
              dtype_name(dtype));
  check_value(array.view.device == device, op, argument, " must be on the device of the inputs");
  TensorView wanted;
  wanted.dims = static_cast<int32_t>(shape.size());
  for (int i = 0; i < wanted.dims; ++i) wanted.shape[i] = shape[i];
  check_value(same_shape(array.view, wanted), op, argument, " has shape ", shape_text(array.view), " and must have ",
              shape_text(wanted));
  return array;
}

}  // namespace pycore::python
