// SPDX-License-Identifier: Apache-2.0
// The forward kernels for float16.
#include "forward.cuh"

namespace pycore {

Status launch_forward_float16(const AttentionParams& params, const TilePlan& plan, void* stream) {
  return launch_forward_of<Float16>(params, plan, stream);
}

int64_t forward_shared_float16(const TilePlan& plan) { return forward_shared_of<Float16>(plan); }

}  // namespace pycore
