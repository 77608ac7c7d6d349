// SPDX-License-Identifier: Apache-2.0
// The definition of the pairwise kernels: plain loops, float and double.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace pycore::scalar {
namespace {

#include "hamming.inl.h"

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
T score(const PairwiseParams& params, const T* x, const T* y) {
  T total = 0;
  for (int64_t block = 0; block < params.dim; block += kPairwiseDepth) {
    T chain = 0;
    for (int64_t d = block; d < std::min(block + kPairwiseDepth, params.dim); ++d) {
      const T difference = x[d] - y[d];
      chain = params.euclidean ? std::fma(difference, difference, chain) : std::fma(x[d], y[d], chain);
    }
    total = block == 0 ? chain : total + chain;
  }
  return total;
}

template <class T>
void scores(const PairwiseParams& params, int64_t batch, Range rows, Range columns, void* memory, void*) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* const out = static_cast<T*>(memory) + (r - rows.begin) * kSegmentStride;
    const T* const x = params.x.at<T>(batch, r);
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      out[c - columns.begin] = score(params, x, params.y.at<T>(batch, c));
    }
  }
}

template <class T>
void logits(void* memory, int64_t count, double scale, const void* bias, double softcap) {
  T* const row = static_cast<T*>(memory);
  const T factor = static_cast<T>(scale), cap = static_cast<T>(softcap);
  for (int64_t c = 0; c < count; ++c) {
    const T z = bias ? std::fma(row[c], factor, static_cast<const T*>(bias)[c]) : row[c] * factor;
    row[c] = cap > 0 ? cap * std::tanh(z / cap) : z;
  }
}

template <class T>
void reduce(const void* memory, int64_t count, void* largest, void* sum) {
  const T* const row = static_cast<const T*>(memory);
  T most = -kInfinity<T>;
  double total = 0;
  for (int64_t c = 0; c < count; ++c) most = row[c] > most ? row[c] : most;
  const T from = most == -kInfinity<T> ? T(0) : most;
  for (int64_t c = 0; c < count; ++c) total += std::exp(row[c] - from);
  *static_cast<T*>(largest) = most;
  *static_cast<T*>(sum) = static_cast<T>(total);
}

template <class T>
void total(const void* memory, int64_t count, void* sum) {
  T all = 0;
  for (int64_t c = 0; c < count; ++c) all += static_cast<const T*>(memory)[c];
  *static_cast<T*>(sum) = all;
}

template <class T>
void reduce_columns(const void* memory, int64_t rows, int64_t count, void* largest, void* sum) {
  const T* const logits = static_cast<const T*>(memory);
  for (int64_t c = 0; c < count; ++c) {
    T most = -kInfinity<T>;
    for (int64_t r = 0; r < rows; ++r) most = std::max(most, logits[r * kSegmentStride + c]);
    const T from = most == -kInfinity<T> ? T(0) : most;
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += std::exp(logits[r * kSegmentStride + c] - from);
    static_cast<T*>(largest)[c] = most;
    static_cast<T*>(sum)[c] = static_cast<T>(total);
  }
}

template <class T>
void gradient(void* memory, int64_t count, double lse, const double* weights, int64_t target, double scale,
              double softcap, const void* weights_of_columns, const void* lse_of_columns, void* bias_memory) {
  const T* const column_weights = static_cast<const T*>(weights_of_columns);
  const T* const column_lse = static_cast<const T*>(lse_of_columns);
  T* const row = static_cast<T*>(memory);
  T* const bias = static_cast<T*>(bias_memory);
  const T from = static_cast<T>(lse), cap = static_cast<T>(softcap);
  for (int64_t c = 0; c < count; ++c) {
    const T z = row[c];
    T g = static_cast<T>(weights[2]);
    if (from != -kInfinity<T>) g = std::fma(static_cast<T>(weights[0]), std::exp(z - from), g);
    if (c == target) g += static_cast<T>(weights[1]);
    if (column_weights) g = std::fma(column_weights[c], std::exp(z - column_lse[c]), g);
    if (cap > 0) g *= std::fma(-(z / cap), z / cap, T(1));
    bias[c] += g;
    row[c] = g * static_cast<T>(scale);
  }
}

template <class T>
void columns_product(const PairwiseParams& params, int64_t batch, Range rows, int64_t columns, const void* g,
                     void* memory) {
  const T* const gradients = static_cast<const T*>(g);
  for (int64_t c = 0; c < columns; ++c) {
    T* const out = static_cast<T*>(memory) + c * params.dim;
    for (int64_t d = 0; d < params.dim; ++d) {
      T chain = 0;
      for (int64_t r = 0; r < rows.count(); ++r) {
        chain = std::fma(gradients[r * kSegmentStride + c], params.x.at<T>(batch, rows.begin + r)[d], chain);
      }
      out[d] += chain;
    }
  }
}

template <class T>
void rows_product(const PairwiseParams& params, int64_t batch, int64_t rows, Range columns, Range channels,
                  const void* g, void* memory, void*) {
  const T* const gradients = static_cast<const T*>(g);
  for (int64_t c = columns.begin; c < columns.end; c += kPairwiseDepth) {
    const int64_t depth = std::min(kPairwiseDepth, columns.end - c);
    for (int64_t r = 0; r < rows; ++r) {
      T* const out = static_cast<T*>(memory) + r * params.dim;
      for (int64_t d = 0; d < channels.count(); ++d) {
        T chain = 0;
        for (int64_t k = 0; k < depth; ++k) {
          chain = std::fma(gradients[r * kSegmentStride + c - columns.begin + k],
                           params.y.at<T>(batch, c + k)[channels.begin + d], chain);
        }
        out[d] += chain;
      }
    }
  }
}

template <class T>
void select(void* memory, int64_t count, int64_t first, int64_t k, int64_t* held, void* best, int64_t* indices) {
  const T* const row = static_cast<const T*>(memory);
  for (int64_t c = 0; c < count; ++c) insert_largest(row[c], first + c, k, held, static_cast<T*>(best), indices);
}

// In sixteen lanes, as pycore/vq/vq.h has it.
template <class T>
void distance(const void* x, const void* y, int64_t dim, void* out) {
  T lanes[16] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const T difference = static_cast<const T*>(x)[d] - static_cast<const T*>(y)[d];
    lanes[d % 16] = std::fma(difference, difference, lanes[d % 16]);
  }
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  *static_cast<T*>(out) = lanes[0];
}

template <class T>
constexpr PairwiseKernels table() {
  return {0,           scores<T>,          nullptr,         nullptr,
          logits<T>,   reduce<T>,          total<T>,        reduce_columns<T>,
          gradient<T>, columns_product<T>, rows_product<T>, select<T>,
          distance<T>, hamming_rows};
}

}  // namespace

const PairwiseKernels pairwise_float = table<float>();
const PairwiseKernels pairwise_double = table<double>();

}  // namespace pycore::scalar
