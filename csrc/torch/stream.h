// SPDX-License-Identifier: Apache-2.0
// The current CUDA stream through the stable ABI: the one place that knows how.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Defined by libtorch_cuda. Weak, because the same binary has to load where torch has no CUDA: there it is null. (The
// header declares it only under USE_CUDA.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace pycore {

// The stream torch is using on this device, as the kernels' launchers take it.
inline void* current_cuda_stream(int32_t device_index, const char* op) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(std::string(op) +
                             ": the tensors are on a CUDA device, but torch's CUDA library is not loaded: install a "
                             "torch that was built with CUDA");
  }
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": torch has no current stream on CUDA device " +
                             std::to_string(device_index));
  }
  return stream;
}

}  // namespace pycore
