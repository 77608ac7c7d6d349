// SPDX-License-Identifier: Apache-2.0
// The launchers of a library built without CUDA: each says so.
#ifndef PYCORE_WITH_CUDA

#include <pycore/attention/attention.h>
#include <pycore/attention/blocks.h>
#include <pycore/attention/cache.h>

namespace pycore {
namespace {
constexpr Status kNoCuda = {StatusCode::kUnsupported,
                            "this build of pycore has no CUDA kernels; rebuild it with PYCORE_CUDA=on where nvcc is"};
}  // namespace

int64_t launch_attention_forward_scratch(const AttentionParams&) { return 0; }
Status launch_attention_forward(const AttentionParams&, void*, void*) { return kNoCuda; }
int64_t launch_attention_backward_scratch(const AttentionBackwardParams&) { return 0; }
Status launch_attention_backward(const AttentionBackwardParams&, void*, void*) { return kNoCuda; }
Status launch_attention_blocks(const BlockParams&, void*) { return kNoCuda; }
Status launch_block_correction(const BlockParams&, void*) { return kNoCuda; }
Status launch_lambda_cache_append(const CacheAppendParams&, void*) { return kNoCuda; }

}  // namespace pycore

#endif  // PYCORE_WITH_CUDA
