// SPDX-License-Identifier: Apache-2.0
// The definition of the linear family's kernels: plain loops. std::fma rounds once, as the vector units do, so the
// other instruction sets are compared with this one bit for bit. bfloat16 and float16 are computed in float32.
#define PYCORE_LANES 1
#include <pycore/dtype.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"

namespace pycore::scalar {
namespace {
#include "gated.inl.h"
#include "pointwise.inl.h"

struct BFloat16 {
  BFloat16(float x) : bits(bfloat16_from_float(x)) {}
  operator float() const { return float_from_bfloat16(bits); }
  uint16_t bits;
};
struct Float16 {
  Float16(float x) : bits(float16_from_float(x)) {}
  operator float() const { return float_from_float16(bits); }
  uint16_t bits;
};

// What is computed in where T is stored.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

template <class T, class S = Sum<T>>
void forward(const LinearParams& params, Range rows, Range columns, void*) {
  const T* bias = static_cast<const T*>(params.bias);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = params.x.row<T>(r);
    T* out = static_cast<T*>(params.out) + r * params.out_stride;
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      const T* weight = static_cast<const T*>(params.weight) + n * params.weight_stride;
      const S sum =
          block_sum<S>(params.in_features, [&](int64_t k, S chain) { return std::fma(S(x[k]), S(weight[k]), chain); });
      out[n] = bias ? sum + S(bias[n]) : sum;
    }
  }
}

template <class T, class S = Sum<T>>
void grad_x(const LinearBackwardParams& params, Range rows, Range columns, void*) {
  const T* weight = static_cast<const T*>(params.weight);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* grad = params.grad_out.row<T>(r);
    T* out = static_cast<T*>(params.grad_x) + r * params.in_features;
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      out[k] = block_sum<S>(params.out_features, [&](int64_t n, S chain) {
        return std::fma(S(grad[n]), S(weight[n * params.weight_stride + k]), chain);
      });
    }
  }
}

template <class T, class S = Sum<T>>
void grad_weight(const LinearBackwardParams& params, Range outs, Range columns, void*) {
  for (int64_t n = outs.begin; n < outs.end; ++n) {
    T* out = static_cast<T*>(params.grad_weight) + n * params.in_features;
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      out[k] = block_sum<S>(params.x.rows, [&](int64_t r, S chain) {
        return std::fma(S(params.grad_out.row<T>(r)[n]), S(params.x.row<T>(r)[k]), chain);
      });
    }
  }
}

template <class T, class S = Sum<T>>
void grad_bias(const LinearBackwardParams& params, Range outs) {
  for (int64_t n = outs.begin; n < outs.end; ++n) {
    static_cast<T*>(params.grad_bias)[n] =
        block_sum<S>(params.x.rows, [&](int64_t r, S chain) { return chain + S(params.grad_out.row<T>(r)[n]); });
  }
}

// The sum over channels of term(c, lane's chain).
template <class S, class Term>
S lane_sum(int64_t channels, const Term& term) {
  S lanes[kNormLanes] = {};
  for (int64_t c = 0; c < channels; ++c) lanes[c % kNormLanes] = term(c, lanes[c % kNormLanes]);
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <class T, class S = Sum<T>>
S inverse_rms(const T* x, int64_t channels, double eps) {
  const S squares = lane_sum<S>(channels, [&](int64_t c, S chain) { return std::fma(S(x[c]), S(x[c]), chain); });
  return S(1) / std::sqrt(squares / static_cast<S>(channels) + static_cast<S>(eps));
}

// What a normalised row is multiplied by.
template <class T, class Params, class S = Sum<T>>
S norm_factor(const Params& params, int64_t c) {
  if (!params.weight) return S(1);
  const S w = S(static_cast<const T*>(params.weight)[c]);
  return params.plus_one ? w + S(1) : w;
}

template <class T, class S = Sum<T>>
void norm(const RmsNormParams& params, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = params.x.row<T>(r);
    T* out = static_cast<T*>(params.out) + r * params.channels;
    const S scale = inverse_rms(x, params.channels, params.eps);
    for (int64_t c = 0; c < params.channels; ++c) {
      out[c] = S(x[c]) * scale * norm_factor<T>(params, c);
    }
  }
}

// The rows' sums of `columns` numbers each, in chains of kNormRowBlock rows that are added in order. row(r, chain) adds
// a row's to the chain, which is null where no sums are wanted.
template <class S, class Row>
void row_sums(Range rows, int64_t columns, void* partial_memory, void* chain_memory, const Row& row) {
  S *partial = static_cast<S*>(partial_memory), *chain = static_cast<S*>(chain_memory);
  if (partial) std::fill(partial, partial + columns, S(0));
  for (int64_t block = rows.begin; block < rows.end; block += kNormRowBlock) {
    if (partial) std::fill(chain, chain + columns, S(0));
    for (int64_t r = block; r < std::min(block + kNormRowBlock, rows.end); ++r) row(r, partial ? chain : nullptr);
    for (int64_t c = 0; partial && c < columns; ++c) partial[c] += chain[c];
  }
}

// With y = x / rms and h = grad_out * weight: grad_x = (h - y * mean(h y)) / rms and grad_weight = sum of grad_out y.
template <class T, class S = Sum<T>>
void norm_backward(const RmsNormBackwardParams& params, Range rows, void* partial, void* chain_memory) {
  const int64_t channels = params.channels;
  row_sums<S>(rows, channels, partial, chain_memory, [&](int64_t r, S* chain) {
    const T* x = params.x.row<T>(r);
    const T* grad = params.grad_out.row<T>(r);
    const auto h = [&](int64_t c) { return S(grad[c]) * norm_factor<T>(params, c); };
    const S scale = inverse_rms(x, channels, params.eps);
    const S dot = lane_sum<S>(channels, [&](int64_t c, S link) { return std::fma(h(c), S(x[c]), link); });
    const S mean = dot * scale / static_cast<S>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const S y = S(x[c]) * scale;
      if (params.grad_x) static_cast<T*>(params.grad_x)[r * channels + c] = std::fma(-y, mean, h(c)) * scale;
      if (chain) chain[c] = std::fma(S(grad[c]), y, chain[c]);
    }
  });
}

// What normalises one row: (x - mean - rest) * scale. The mean is rounded; rest is what it lacks.
template <class T, class S = Sum<T>>
struct Moments {
  Moments(const T* x, int64_t channels, double eps) : x(x) {
    const S size = static_cast<S>(channels);
    mean = lane_sum<S>(channels, [&](int64_t c, S chain) { return chain + S(x[c]); }) / size;
    rest = lane_sum<S>(channels, [&](int64_t c, S chain) { return chain + (S(x[c]) - mean); }) / size;
    const S squares = lane_sum<S>(channels, [&](int64_t c, S chain) {
      const S d = S(x[c]) - mean - rest;
      return std::fma(d, d, chain);
    });
    scale = S(1) / std::sqrt(squares / size + static_cast<S>(eps));
  }
  S normal(int64_t c) const { return (S(x[c]) - mean - rest) * scale; }
  const T* x;
  S mean, rest, scale;
};

template <class T, class S = Sum<T>>
void layer_norm(const LayerNormParams& params, Range rows) {
  const T *weight = static_cast<const T*>(params.weight), *bias = static_cast<const T*>(params.bias);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const Moments<T> moments(params.x.row<T>(r), params.channels, params.eps);
    T* out = static_cast<T*>(params.out) + r * params.channels;
    for (int64_t c = 0; c < params.channels; ++c) {
      S y = moments.normal(c);
      if (weight) y *= S(weight[c]);
      if (bias) y += S(bias[c]);
      out[c] = y;
    }
  }
}

// With y the normalised row and h = grad_out * weight: grad_x = (h - mean(h) - y * mean(h y)) * scale, grad_weight =
// sum of grad_out y and grad_bias = sum of grad_out.
template <class T, class S = Sum<T>>
void layer_norm_backward(const LayerNormBackwardParams& params, Range rows, void* partial, void* chain_memory) {
  const int64_t channels = params.channels;
  const T* weight = static_cast<const T*>(params.weight);
  row_sums<S>(rows, 2 * channels, partial, chain_memory, [&](int64_t r, S* chain) {
    const Moments<T> moments(params.x.row<T>(r), channels, params.eps);
    const T* grad = params.grad_out.row<T>(r);
    const auto h = [&](int64_t c) { return weight ? S(grad[c]) * S(weight[c]) : S(grad[c]); };
    const S size = static_cast<S>(channels);
    const S mean = lane_sum<S>(channels, [&](int64_t c, S link) { return link + h(c); }) / size;
    const S slope =
        lane_sum<S>(channels, [&](int64_t c, S link) { return std::fma(h(c), moments.normal(c), link); }) / size;
    for (int64_t c = 0; c < channels; ++c) {
      const S y = moments.normal(c);
      if (params.grad_x) {
        static_cast<T*>(params.grad_x)[r * channels + c] = std::fma(-y, slope, h(c) - mean) * moments.scale;
      }
      if (!chain) continue;
      chain[c] = std::fma(S(grad[c]), y, chain[c]);
      chain[channels + c] += S(grad[c]);
    }
  });
}

// f and its slope in float64, by the C library; float32 has the formulas of the vector units.
struct Curve {
  double value, slope;
};
Curve curve(Gate function, double x) {
  constexpr double kHalfRoot = 0.70710678118654752440, kDensity = 0.39894228040143267794;
  const double twice = 4 * kDensity, cubic = twice * 0.044715;  // 2 sqrt(2 / pi)
  if (function == Gate::kGelu) {
    const double below = std::erfc(-x * kHalfRoot) / 2;
    return {x * below, below + x * kDensity * std::exp(-x * x / 2)};
  }
  const double u = function == Gate::kSilu ? x : x * (twice + cubic * x * x);
  const double rising = 1 / (1 + std::exp(-u)), falling = 1 / (1 + std::exp(u));
  const double slope = function == Gate::kSilu ? 1 : twice + 3 * cubic * x * x;
  return {x * rising, rising + x * rising * falling * slope};
}

void gated_double(const GatedParams& params, Range elements) {
  for (int64_t i = elements.begin; i < elements.end; ++i) {
    const int64_t row = i / params.channels, c = i % params.channels;
    static_cast<double*>(params.out)[i] =
        curve(params.function, params.gate.row<double>(row)[c]).value * params.up.row<double>(row)[c];
  }
}

void gated_backward_double(const GatedBackwardParams& params, Range elements) {
  for (int64_t i = elements.begin; i < elements.end; ++i) {
    const int64_t row = i / params.channels, c = i % params.channels;
    const Curve f = curve(params.function, params.gate.row<double>(row)[c]);
    const double grad = params.grad_out.row<double>(row)[c], up = params.up.row<double>(row)[c];
    if (params.grad_gate) static_cast<double*>(params.grad_gate)[i] = grad * up * f.slope;
    if (params.grad_up) static_cast<double*>(params.grad_up)[i] = grad * f.value;
  }
}

void rotate_double(const RotateParams& params, Range rows) {
  const int64_t pairs = params.pairs;
  const double *cos = static_cast<const double*>(params.cos), *sin = static_cast<const double*>(params.sin);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const double* x = params.x.row<double>(r);
    double* out = static_cast<double*>(params.out) + r * params.channels;
    const int64_t table = params.table_row(r) * pairs;
    std::copy(x, x + params.channels, out);
    for (int64_t c = 0; c < pairs; ++c) {
      const double s = params.inverse ? -sin[table + c] : sin[table + c], a = x[c], b = x[pairs + c];
      out[c] = std::fma(-b, s, a * cos[table + c]);
      out[pairs + c] = std::fma(a, s, b * cos[table + c]);
    }
  }
}

void softcap_double(const SoftcapParams& params, Range elements) {
  for (int64_t i = elements.begin; i < elements.end; ++i) {
    const int64_t row = i / params.channels, c = i % params.channels;
    const double t = std::tanh(params.x.row<double>(row)[c] / params.cap);
    static_cast<double*>(params.out)[i] =
        params.has_grad ? params.grad_out.row<double>(row)[c] * (1 - t * t) : t * params.cap;
  }
}

template <class T>
constexpr LinearKernels table(decltype(LinearKernels::gated) gated, decltype(LinearKernels::gated_backward) backward,
                              decltype(LinearKernels::rotate) rotate, decltype(LinearKernels::softcap) softcap) {
  return {0,
          0,
          kMaxRows,
          kLinearColumns,
          forward<T>,
          grad_x<T>,
          grad_weight<T>,
          grad_bias<T>,
          norm<T>,
          norm_backward<T>,
          layer_norm<T>,
          layer_norm_backward<T>,
          gated,
          backward,
          rotate,
          softcap};
}

template <class T, DType kType>
constexpr LinearKernels table_of() {
  return table<T>(gated_elements<kType>, gated_backward_elements<kType>, rotate_rows<kType>, softcap_elements<kType>);
}

}  // namespace

const LinearKernels linear_float = table_of<float, DType::kFloat32>();
const LinearKernels linear_double = table<double>(gated_double, gated_backward_double, rotate_double, softcap_double);
const LinearKernels linear_bfloat16 = table_of<BFloat16, DType::kBFloat16>();
const LinearKernels linear_float16 = table_of<Float16, DType::kFloat16>();

}  // namespace pycore::scalar
