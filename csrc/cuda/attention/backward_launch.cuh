// SPDX-License-Identifier: Apache-2.0
// Launches the two halves of the backward pass for a plan.
#pragma once

#include "backward_key.cuh"
#include "backward_query.cuh"

namespace pycore {
namespace {

template <class T>
int64_t backward_shared_of(const TilePlan& plan) {
  return with_channels(plan.channels, [&](auto channels) -> int64_t {
    constexpr int kChannels = decltype(channels)::value;
    return plan.options ? sizeof(KeyShared<T, kChannels, true>) : sizeof(KeyShared<T, kChannels, false>);
  });
}

template <class T, int kChannels, bool kOptions>
Status launch_backward_with(const AttentionBackwardParams& params, const TilePlan& plan, void* stream) {
  const AttentionParams& forward = params.forward;
  const int64_t shared = backward_shared_of<T>(plan);
  Status status = launch(grad_query_kernel<T, kChannels, kOptions>, forward.batch * forward.heads * plan.query_tiles,
                         kBackwardThreads, shared, stream, params, plan);
  const int64_t blocks = forward.batch * forward.kv_heads * most_key_tiles(forward.key_length);
  const auto grad_key = [&](auto key, auto value) {
    if (!status.ok() || forward.key_length == 0) return;
    status = launch(grad_key_kernel<T, kChannels, kOptions, decltype(key)::value, decltype(value)::value>, blocks,
                    kBackwardThreads, shared, stream, params, plan);
  };
  if constexpr (kChannels <= 128) {
    grad_key(Number<true>(), Number<true>());
  } else {
    grad_key(Number<false>(), Number<true>());
    grad_key(Number<true>(), Number<false>());
  }
  return status;
}

constexpr int64_t kMostShared = 227 << 10;  // of a block, on the devices that have most

// use(channels) with the plan's, where there is a device for its tiles.
template <class T, class Use>
Status with_backward_channels(const TilePlan& plan, const Use& use) {
  return with_channels(plan.channels, [&](auto channels) {
    if constexpr (sizeof(KeyShared<T, decltype(channels)::value, false>) <= kMostShared) {
      return use(channels);
    } else {
      return Status{StatusCode::kUnsupported, "no device has the shared memory for these tiles"};
    }
  });
}

template <class T>
Status launch_backward_of(const AttentionBackwardParams& params, const TilePlan& plan, void* stream) {
  return with_backward_channels<T>(plan, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    return plan.options ? launch_backward_with<T, kChannels, true>(params, plan, stream)
                        : launch_backward_with<T, kChannels, false>(params, plan, stream);
  });
}

template <class T>
Status launch_bias_of(const AttentionBackwardParams& params, const TilePlan& plan, double* sums, int64_t chunks,
                      void* stream) {
  return with_backward_channels<T>(plan, [&](auto channels) {
    return launch(grad_bias_kernel<T, decltype(channels)::value>, chunks * params.forward.heads, kBackwardThreads,
                  backward_shared_of<T>(plan), stream, params, plan, sums, chunks);
  });
}

}  // namespace
}  // namespace pycore
