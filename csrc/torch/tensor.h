// SPDX-License-Identifier: Apache-2.0
// What every op of the torch face needs: torch's tensors as views, torch's threads, and a Status as an exception.
#pragma once

#include <pycore/parallel.h>
#include <pycore/sizes.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "../host/checks.h"
#include "text.h"

namespace pycore {

inline DType dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::UInt16: return DType::kUInt16;
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Short: return DType::kInt16;
    case ScalarType::UInt32: return DType::kUInt32;
    case ScalarType::UInt64: return DType::kUInt64;
    default: return DType::kOther;
  }
}

// The view of a tensor, which must outlive it. A view is always defined: what no kernel could take is refused here.
inline TensorView view(const torch::stable::Tensor& tensor, const char* op, const char* argument) {
  TensorView view;
  view.dtype = dtype_of(tensor.scalar_type());
  if (view.dtype == DType::kOther) {
    throw std::invalid_argument(std::string(op) + ": " + argument + " has dtype " +
                                torch::headeronly::toString(tensor.scalar_type()) + ", which no kernel takes");
  }
  view.dims = static_cast<int32_t>(tensor.dim());
  if (view.dims > kMaxDims) {
    throw std::invalid_argument(std::string(op) + ": " + argument + " has " + std::to_string(view.dims) +
                                " dimensions and may have " + std::to_string(kMaxDims));
  }
  view.data = tensor.data_ptr();
  view.device = tensor.is_cpu() ? Device::kCpu : tensor.is_cuda() ? Device::kCuda : Device::kOther;
  view.device_index = view.device == Device::kCpu ? 0 : tensor.get_device_index();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (int32_t i = 0; i < view.dims; ++i) {
    view.shape[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  check_span(op, argument, view);
  return view;
}

// An absent tensor gives a view that is not defined().
inline TensorView view(const std::optional<torch::stable::Tensor>& tensor, const char* op, const char* argument) {
  return tensor.has_value() ? view(*tensor, op, argument) : TensorView{};
}

// A number that a graph computes: compiled code cannot change a float of the schema without being compiled again.
// `numbers`, where given, holds `count` of them in float64 on the CPU, whatever the device of the rest.
inline const double* graph_numbers(const std::optional<torch::stable::Tensor>& numbers, int64_t count, const char* op,
                                   const char* argument) {
  if (!numbers.has_value()) return nullptr;
  const TensorView given = view(*numbers, op, argument);
  check_value(given.dtype == DType::kFloat64 && given.device == Device::kCpu && given.dims == 1 &&
                  given.shape[0] == count && (count == 1 || given.strides[0] == 1),
              op, argument, " must be a contiguous float64 tensor of ", count, " numbers on the CPU");
  return given.as<const double>();
}

// What `make` allocates, or one sentence where there is no room for it; torch's own error names its source files.
template <class Make>
torch::stable::Tensor allocated(std::string_view op, const char* argument, const std::vector<int64_t>& sizes,
                                const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw_out_of_memory(op, argument, sizes);
  }
}

// Memory of the CPU without asking the dispatcher for an op by its name, which a small call would notice.
inline torch::stable::Tensor new_cpu_tensor(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  int64_t strides[kMaxDims];
  const size_t dims = sizes.size();
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride = size_product({stride, sizes[i] > 1 ? sizes[i] : 1});
  }
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

inline torch::stable::Tensor new_tensor(std::string_view op, const char* argument, const torch::stable::Tensor& like,
                                        const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  return allocated(op, argument, sizes, [&] {
    const bool plain = like.is_cpu() && sizes.size() <= kMaxDims;
    return plain ? new_cpu_tensor(sizes, type) : torch::stable::new_empty(like, sizes, type);
  });
}

// Scratch from torch's allocator, so that its memory accounting sees it.
struct Scratch {
  torch::stable::Tensor memory;
  void* data;
  Scratch(std::string_view op, const torch::stable::Tensor& like, int64_t bytes)
      : memory(new_tensor(op, "scratch", like, {size_sum(bytes, 64)}, torch::headeronly::ScalarType::Byte)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data_ptr());
    data = reinterpret_cast<void*>((address + 63) / 64 * 64);
  }
};

// A copy of x without gaps, if it has any.
inline torch::stable::Tensor dense(const torch::stable::Tensor& x, std::string_view op, const char* argument) {
  const auto sizes = x.sizes();
  return allocated(op, argument, {sizes.begin(), sizes.end()}, [&] { return torch::stable::contiguous(x); });
}

// Rows are read where they lie; only a last dimension that is not contiguous costs a copy.
inline torch::stable::Tensor last_contiguous(const torch::stable::Tensor& x, std::string_view op,
                                             const char* argument) {
  return x.dim() == 0 || x.size(-1) <= 1 || x.stride(-1) == 1 ? x : dense(x, op, argument);
}

inline std::optional<torch::stable::Tensor> last_contiguous(const std::optional<torch::stable::Tensor>& x,
                                                            std::string_view op, const char* argument) {
  return x.has_value() ? std::optional<torch::stable::Tensor>(last_contiguous(*x, op, argument)) : std::nullopt;
}

// torch's own thread pool, with as many slots as torch.set_num_threads allows. Inside one of torch's parallel regions
// parallel_for runs everything on the calling thread, so nesting is safe.
inline Parallel torch_parallel() {
  Parallel parallel;
  parallel.threads = torch::stable::get_num_threads();
  if (parallel.threads > kMostThreads) {
    parallel.threads = clamped_threads(parallel.threads, std::thread::hardware_concurrency());
  }
  parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
    torch::stable::parallel_for(0, slots, 1, [body, argument](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) body(argument, slot);
    });
  };
  return parallel;
}

// A kernel's Status as a RuntimeError. What the caller did wrong was a ValueError before any kernel ran.
inline void throw_if(const Status& status, const char* op) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

}  // namespace pycore
