// SPDX-License-Identifier: Apache-2.0
// The tensor-core kernels for float16.
#include "attention_mma.cuh"

namespace pycore {

Status launch_mma_float16(const AttentionParams& params, const MmaPlan& plan, void* stream) {
  return launch_mma_dtype<Float16>(params, plan, stream);
}

}  // namespace pycore
