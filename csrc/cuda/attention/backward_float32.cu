// SPDX-License-Identifier: Apache-2.0
// The backward kernels for float32.
#include "backward_launch.cuh"

namespace pycore {

Status launch_backward_float32(const AttentionBackwardParams& params, const TilePlan& plan, void* stream) {
  return launch_backward_of<float>(params, plan, stream);
}

Status launch_bias_float32(const AttentionBackwardParams& params, const TilePlan& plan, double* sums, int64_t chunks,
                           void* stream) {
  return launch_bias_of<float>(params, plan, sums, chunks, stream);
}

int64_t backward_shared_float32(const TilePlan& plan) { return backward_shared_of<float>(plan); }

}  // namespace pycore
