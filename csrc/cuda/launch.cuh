// SPDX-License-Identifier: Apache-2.0
// What a launcher asks of the CUDA runtime, for the current device. tests/native/cuda_emulation.h has the same names.
#pragma once

#include <pycore/status.h>

#include <cstdint>

#if !defined(PYCORE_CUDA_EMULATED)

#include <cuda_runtime.h>

namespace pycore {
namespace {

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status() : Status{StatusCode::kCuda, cudaGetErrorString(error)};
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    return 0;
  }
  return value;
}
inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Bytes of shared memory that a block may have.
inline int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline Status clear_memory(void* memory, int64_t bytes, void* stream) {
  return bytes > 0 ? status_of(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream))) : Status();
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

template <class... Params>
Status launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared, void* stream,
              const Params&... params) {
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return {StatusCode::kUnsupported, "the problem has too many rows for one launch"};
  if (shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return status_of(error);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
      params...);
  return status_of(cudaGetLastError());
}

}  // namespace
}  // namespace pycore

#endif  // PYCORE_CUDA_EMULATED
