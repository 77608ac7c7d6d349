// SPDX-License-Identifier: Apache-2.0
// The backward kernels for bfloat16.
#include "attention_backward_key.cuh"

namespace pycore {

Status launch_backward_bfloat16(const AttentionBackwardParams& params, const TilePlan& plan, void* stream) {
  return launch_backward_of<BFloat16>(params, plan, stream);
}

int64_t backward_shared_bfloat16(const TilePlan& plan) { return backward_shared_of<BFloat16>(plan); }

}  // namespace pycore
