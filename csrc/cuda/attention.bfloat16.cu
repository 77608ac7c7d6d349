// SPDX-License-Identifier: Apache-2.0
// The tensor-core kernels for bfloat16.
#include "attention_mma.cuh"

namespace pycore {

Status launch_mma_bfloat16(const AttentionParams& params, const MmaPlan& plan, void* stream) {
  return launch_mma_dtype<BFloat16>(params, plan, stream);
}

}  // namespace pycore
