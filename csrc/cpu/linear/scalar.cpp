// SPDX-License-Identifier: Apache-2.0
// The definition of the linear and norm kernels: plain loops, float and double. std::fma rounds once, as the vector
// units do, so the other instruction sets are compared with this one bit for bit.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace pycore::scalar {
namespace {

// The sum of terms(0) .. terms(count - 1): blocks of FMA chains, added in order. term(i, chain) is the chain's next
// link.
template <class T, class Term>
T block_sum(int64_t count, const Term& term) {
  T total = 0;
  for (int64_t block = 0; block < count; block += kLinearBlock) {
    T chain = 0;
    const int64_t end = std::min(block + kLinearBlock, count);
    for (int64_t i = block; i < end; ++i) chain = term(i, chain);
    total = block == 0 ? chain : total + chain;
  }
  return total;
}

template <class T>
void forward(const LinearParams& params, Range rows, Range columns, void*) {
  const T* bias = static_cast<const T*>(params.bias);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = params.x.row<T>(r);
    T* out = static_cast<T*>(params.out) + r * params.out_features;
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      const T* weight = static_cast<const T*>(params.weight) + n * params.weight_stride;
      out[n] = block_sum<T>(params.in_features, [&](int64_t k, T chain) { return std::fma(x[k], weight[k], chain); });
      if (bias) out[n] += bias[n];
    }
  }
}

template <class T>
void grad_x(const LinearBackwardParams& params, Range rows, Range columns, void*) {
  const T* weight = static_cast<const T*>(params.weight);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* grad = params.grad_out.row<T>(r);
    T* out = static_cast<T*>(params.grad_x) + r * params.in_features;
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      out[k] = block_sum<T>(params.out_features, [&](int64_t n, T chain) {
        return std::fma(grad[n], weight[n * params.weight_stride + k], chain);
      });
    }
  }
}

template <class T>
void grad_weight(const LinearBackwardParams& params, Range outs, Range columns, void*) {
  for (int64_t n = outs.begin; n < outs.end; ++n) {
    T* out = static_cast<T*>(params.grad_weight) + n * params.in_features;
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      out[k] = block_sum<T>(params.x.rows, [&](int64_t r, T chain) {
        return std::fma(params.grad_out.row<T>(r)[n], params.x.row<T>(r)[k], chain);
      });
    }
  }
}

template <class T>
void grad_bias(const LinearBackwardParams& params, Range outs) {
  for (int64_t n = outs.begin; n < outs.end; ++n) {
    static_cast<T*>(params.grad_bias)[n] =
        block_sum<T>(params.x.rows, [&](int64_t r, T chain) { return chain + params.grad_out.row<T>(r)[n]; });
  }
}

// The sum over channels of term(c, lane's chain).
template <class T, class Term>
T lane_sum(int64_t channels, const Term& term) {
  T lanes[kNormLanes] = {};
  for (int64_t c = 0; c < channels; ++c) lanes[c % kNormLanes] = term(c, lanes[c % kNormLanes]);
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <class T>
T inverse_rms(const T* x, int64_t channels, double eps) {
  const T squares = lane_sum<T>(channels, [&](int64_t c, T chain) { return std::fma(x[c], x[c], chain); });
  return T(1) / std::sqrt(squares / static_cast<T>(channels) + static_cast<T>(eps));
}

template <class T>
void norm(const RmsNormParams& params, Range rows) {
  const T* weight = static_cast<const T*>(params.weight);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = params.x.row<T>(r);
    T* out = static_cast<T*>(params.out) + r * params.channels;
    const T scale = inverse_rms(x, params.channels, params.eps);
    for (int64_t c = 0; c < params.channels; ++c) {
      const T y = x[c] * scale;
      out[c] = weight ? y * weight[c] : y;
    }
  }
}

// With y = x / rms and h = grad_out * weight: grad_x = (h - y * mean(h y)) / rms and grad_weight = sum of grad_out y.
template <class T>
void norm_backward(const RmsNormBackwardParams& params, Range rows, void* partial_memory, void* chain_memory) {
  const int64_t channels = params.channels;
  const T* weight = static_cast<const T*>(params.weight);
  T* partial = static_cast<T*>(partial_memory);
  T* chain = static_cast<T*>(chain_memory);
  if (partial) std::fill(partial, partial + channels, T(0));
  for (int64_t block = rows.begin; block < rows.end; block += kNormRowBlock) {
    if (partial) std::fill(chain, chain + channels, T(0));
    for (int64_t r = block; r < std::min(block + kNormRowBlock, rows.end); ++r) {
      const T* x = params.x.row<T>(r);
      const T* grad = params.grad_out.row<T>(r);
      const auto h = [&](int64_t c) { return weight ? grad[c] * weight[c] : grad[c]; };
      const T scale = inverse_rms(x, channels, params.eps);
      const T dot = lane_sum<T>(channels, [&](int64_t c, T link) { return std::fma(h(c), x[c], link); });
      const T mean = dot * scale / static_cast<T>(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const T y = x[c] * scale;
        if (params.grad_x) static_cast<T*>(params.grad_x)[r * channels + c] = std::fma(-y, mean, h(c)) * scale;
        if (partial) chain[c] = std::fma(grad[c], y, chain[c]);
      }
    }
    for (int64_t c = 0; partial && c < channels; ++c) partial[c] += chain[c];
  }
}

}  // namespace

const LinearKernels linear_float = {
    0, 0, forward<float>, grad_x<float>, grad_weight<float>, grad_bias<float>, norm<float>, norm_backward<float>};
const LinearKernels linear_double = {
    0, 0, forward<double>, grad_x<double>, grad_weight<double>, grad_bias<double>, norm<double>, norm_backward<double>};

}  // namespace pycore::scalar
