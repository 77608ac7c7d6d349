// SPDX-License-Identifier: Apache-2.0
// The forward kernels for bfloat16.
#include "forward.cuh"

namespace pycore {

Status launch_forward_bfloat16(const AttentionParams& params, const TilePlan& plan, void* stream) {
  return launch_forward_of<BFloat16>(params, plan, stream);
}

int64_t forward_shared_bfloat16(const TilePlan& plan) { return forward_shared_of<BFloat16>(plan); }

}  // namespace pycore
