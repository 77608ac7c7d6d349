// SPDX-License-Identifier: Apache-2.0
// The gradients of given pairs' scores: one order on every instruction set, and a thread takes channels, so that
// threads change no sum.
#include "choose.h"

namespace pycore {

using namespace pairwise;

namespace {

constexpr int64_t kChannels = 64;

template <class T>
void channels_of(const PairwisePairsBackwardParams& params, int64_t batch, Range channels) {
  T* const grad_x = static_cast<T*>(params.grad_x) + batch * params.rows * params.dim;
  T* const grad_y = static_cast<T*>(params.grad_y) + batch * params.columns * params.dim;
  for (int64_t j = 0; j < params.columns; ++j) {
    for (int64_t d = channels.begin; d < channels.end; ++d) grad_y[j * params.dim + d] = 0;
  }
  for (int64_t row = 0; row < params.rows; ++row) {
    const T* const x = params.x.at<T>(batch, row);
    T* const of_x = grad_x + row * params.dim;
    for (int64_t d = channels.begin; d < channels.end; ++d) of_x[d] = 0;
    for (int64_t i = 0; i < params.k; ++i) {
      const int64_t at = (batch * params.rows + row) * params.k + i, index = params.indices[at];
      if (index < 0) continue;
      const T g = static_cast<const T*>(params.grad)[at];
      const T* const y = params.y.at<T>(batch, index);
      T* const of_y = grad_y + index * params.dim;
      if (params.euclidean) {
        for (int64_t d = channels.begin; d < channels.end; ++d) {
          const T part = 2 * g * (x[d] - y[d]);
          of_x[d] += part;
          of_y[d] -= part;
        }
      } else {
        for (int64_t d = channels.begin; d < channels.end; ++d) {
          of_x[d] += g * y[d];
          of_y[d] += g * x[d];
        }
      }
    }
  }
}

}  // namespace

Status pairwise_pairs_backward(const PairwisePairsBackwardParams& params, const Parallel& parallel) {
  if (!kernels_for(params.dtype, params.isa)) return kNoKernel;
  const int64_t items = parts(params.dim, kChannels);
  const int64_t work = size_product({params.batch, params.rows + params.columns, params.k, params.dim});
  for_each_item(limited(parallel, work, kSerialWork), params.batch * items, [&](int64_t, int64_t item) {
    const Range channels = part(item % items, kChannels, params.dim);
    if (params.dtype == DType::kFloat64) {
      channels_of<double>(params, item / items, channels);
    } else {
      channels_of<float>(params, item / items, channels);
    }
  });
  return {};
}

}  // namespace pycore
