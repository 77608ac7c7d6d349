// SPDX-License-Identifier: Apache-2.0
// The forward kernels for float32.
#include "forward.cuh"

namespace pycore {

Status launch_forward_float32(const AttentionParams& params, const TilePlan& plan, void* stream) {
  return launch_forward_of<float>(params, plan, stream);
}

int64_t forward_shared_float32(const TilePlan& plan) { return forward_shared_of<float>(plan); }

}  // namespace pycore
