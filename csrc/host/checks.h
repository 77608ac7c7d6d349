// SPDX-License-Identifier: Apache-2.0
// Argument errors, for the two faces only (kernels never throw). Every message is one sentence that names the op,
// the argument, what it was and what it must be:  "lambda_attention: key has 3 heads, which ..."
#pragma once

#include <pycore/dtype.h>
#include <pycore/sizes.h>
#include <pycore/tensor_view.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace pycore {

namespace detail {
template <class... Parts>
std::string sentence(std::string_view op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  return text.str();
}
}  // namespace detail

// ValueError in Python.
template <class... Parts>
void check_value(bool condition, std::string_view op, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(detail::sentence(op, parts...));
}

// IndexError in Python.
template <class... Parts>
void check_index(bool condition, std::string_view op, const Parts&... parts) {
  if (!condition) throw std::out_of_range(detail::sentence(op, parts...));
}

// A view's shape as part of a sentence, put into words where one is thrown: a check that holds writes nothing.
struct ShapeText {
  const TensorView& view;
};

inline ShapeText shape_text(const TensorView& view) { return {view}; }

inline std::ostream& operator<<(std::ostream& text, const ShapeText& shape) {
  text << '[';
  for (int i = 0; i < shape.view.dims; ++i) text << (i ? ", " : "") << shape.view.shape[i];
  return text << ']';
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dims == b.dims && std::equal(a.shape, a.shape + a.dims, b.shape);
}

// MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const std::string& text) : text_(text) {}
  const char* what() const noexcept override { return text_.what(); }

 private:
  std::runtime_error text_;  // a string whose copies throw nothing
};

[[noreturn]] inline void throw_out_of_memory(std::string_view op, const char* argument,
                                             const std::vector<int64_t>& sizes) {
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  throw OutOfMemory(std::string(op) + ": " + argument + " has shape [" + shape +
                    "] and must fit into memory, where it could not be allocated");
}

// A vector of `count` elements, or one sentence.
template <class T>
std::vector<T> memory_for(std::string_view op, const char* argument, int64_t count) {
  try {
    return std::vector<T>(static_cast<size_t>(count));
  } catch (const std::exception&) {  // bad_alloc, or the length_error of what no vector can hold
    throw_out_of_memory(op, argument, {count});
  }
}

// What a view spans must fit an int64, so that products of its sizes do too. An expanded one can say any shape.
inline void check_span(std::string_view op, const char* argument, const TensorView& view) {
  int64_t bytes = dtype_size(view.dtype);
  bool over = false;
  for (int i = 0; i < view.dims; ++i) {
    over = over || (view.shape[i] > 0 && __builtin_mul_overflow(bytes, view.shape[i], &bytes));
  }
  check_value(!over, op, argument, " has shape ", shape_text(view), ", which is more than any memory holds");
}

// ---- one tensor
// ------------------------------------------------------------------------------------------------------

inline bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

inline bool is_integer(DType dtype) {
  switch (dtype) {
    case DType::kInt8:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64:
    case DType::kUInt8:
    case DType::kUInt16:
    case DType::kUInt32:
    case DType::kUInt64: return true;
    default: return false;
  }
}

// For ops that have no other kernels.
inline void check_on_cpu(std::string_view op, const char* argument, const TensorView& view) {
  check_value(view.device == Device::kCpu, op, argument, " is not on the CPU, which is where this op has kernels");
}

inline void check_contiguous(std::string_view op, const char* argument, const TensorView& view) {
  check_value(view.contiguous(), op, argument, " must be contiguous");
}

inline void check_last_contiguous(std::string_view op, const char* argument, const TensorView& view) {
  check_value(view.last_contiguous(), op, argument, "'s last dimension must be contiguous");
}

// `of` names the tensor whose device it must be on.
inline void check_device_of(std::string_view op, const char* argument, const TensorView& view, const TensorView& like,
                            const char* of) {
  check_value(same_device(view, like), op, argument, " is on another device than ", of);
}

// Dtype and device.
inline void check_like(std::string_view op, const char* argument, const TensorView& view, const TensorView& like,
                       const char* of) {
  check_value(view.dtype == like.dtype, op, argument, " is ", dtype_name(view.dtype), " and must be ",
              dtype_name(like.dtype), " like ", of);
  check_device_of(op, argument, view, like, of);
}

// ---- where results go -----------------------------------------------------------------------------------------------

struct NamedView {
  const char* name;
  const TensorView& view;
};

// The addresses from the first byte of any element to behind the last.
inline void address_range(const TensorView& view, uintptr_t* begin, uintptr_t* end) {
  const int64_t size = dtype_size(view.dtype);
  int64_t lowest = 0, highest = 0;
  for (int i = 0; i < view.dims; ++i) {
    const int64_t reach = (view.shape[i] - 1) * view.strides[i] * size;
    (reach < 0 ? lowest : highest) += reach;
  }
  const uintptr_t data = reinterpret_cast<uintptr_t>(view.data);
  *begin = data + static_cast<uintptr_t>(lowest);
  *end = data + static_cast<uintptr_t>(highest + size);
}

inline bool overlap(const TensorView& a, const TensorView& b) {
  if (!a.defined() || !b.defined() || a.count() == 0 || b.count() == 0) return false;
  if (a.device != b.device || a.device_index != b.device_index) return false;
  uintptr_t a_begin, a_end, b_begin, b_end;
  address_range(a, &a_begin, &a_end);
  address_range(b, &b_begin, &b_end);
  return a_begin < b_end && b_begin < a_end;
}

// What is written must share no memory with what is read while it is written, nor with another result.
template <class Outputs, class Inputs>
void check_disjoint(std::string_view op, const Outputs& outputs, const Inputs& inputs) {
  for (auto out = std::begin(outputs); out != std::end(outputs); ++out) {
    for (const NamedView& in : inputs) {
      check_value(!overlap(out->view, in.view), op, out->name, " overlaps ", in.name,
                  " and must have memory of its own");
    }
    for (auto other = std::begin(outputs); other != out; ++other) {
      check_value(!overlap(out->view, other->view), op, out->name, " overlaps ", other->name,
                  " and must have memory of its own");
    }
  }
}

inline void check_disjoint(std::string_view op, std::initializer_list<NamedView> outputs,
                           std::initializer_list<NamedView> inputs) {
  check_disjoint<std::initializer_list<NamedView>, std::initializer_list<NamedView>>(op, outputs, inputs);
}

}  // namespace pycore
