// SPDX-License-Identifier: Apache-2.0
// The rotation trick's linear map, row by row: vq_rotate of pycore/vq/vq.h. Plain loops whose sums have sixteen lanes,
// so that every instruction set gives the same bits; a row lies in the first-level cache for all three passes.
#include <pycore/dtype.h>
#include <pycore/sizes.h>
#include <pycore/vq/vq.h>

#include <algorithm>
#include <cmath>

namespace pycore {
namespace {

constexpr int64_t kSerialWork = 1 << 14;
constexpr int64_t kRows = 32;  // of an item
constexpr int kSumLanes = 16;

template <class T>
struct LaneSum {
  T lanes[kSumLanes] = {};
  T total() const {
    T sums[kSumLanes];
    std::copy(lanes, lanes + kSumLanes, sums);
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
  }
};

// body(i, lane) for all channels; the inner loop has a fixed count, so that the compiler makes vectors of it.
template <class Body>
void for_channels(int64_t dim, const Body& body) {
  int64_t i = 0;
  for (; i + kSumLanes <= dim; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) body(i + l, l);
  }
  for (int l = 0; i < dim; ++i, ++l) body(i, l);
}

template <class T>
void rotate_row(const T* v, const T* x, const T* code, int64_t dim, bool transpose, T* out) {
  constexpr T kLeast = static_cast<T>(1e-6);  // a length below this is none
  LaneSum<T> x_squares, code_squares;
  for_channels(dim, [&](int64_t i, int l) {
    x_squares.lanes[l] += x[i] * x[i];
    code_squares.lanes[l] += code[i] * code[i];
  });
  const T x_norm = std::sqrt(x_squares.total()), code_norm = std::sqrt(code_squares.total());
  const T x_scale = 1 / std::max(x_norm, kLeast), code_scale = 1 / std::max(code_norm, kLeast);
  const T* const from = transpose ? code : x;
  const T* const to = transpose ? x : code;
  LaneSum<T> halfway_squares, halfway_dots, from_dots;
  for_channels(dim, [&](int64_t i, int l) {
    const T halfway = x[i] * x_scale + code[i] * code_scale;
    halfway_squares.lanes[l] += halfway * halfway;
    halfway_dots.lanes[l] += halfway * v[i];
    from_dots.lanes[l] += from[i] * v[i];
  });
  const T ratio = code_norm * x_scale;
  const T along_half = -2 * ratio * halfway_dots.total() / std::max(halfway_squares.total(), kLeast * kLeast);
  const T along_to = 2 * ratio * from_dots.total() * x_scale * code_scale;
  for_channels(dim, [&](int64_t i, int) {
    const T halfway = x[i] * x_scale + code[i] * code_scale;
    out[i] = v[i] * ratio + halfway * along_half + to[i] * along_to;
  });
}

template <class T>
void rotate_rows(const VqRotateParams& params, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(params.out);
  for (int64_t row = begin; row < end; ++row) {
    rotate_row(params.v.row<T>(row), params.x.row<T>(row), params.code.row<T>(row), params.dim, params.transpose,
               out + row * params.dim);
  }
}

}  // namespace

Status vq_rotate(const VqRotateParams& params, const Parallel& parallel) {
  const int64_t rows = params.v.rows;
  const Parallel pool = limited(parallel, size_product({rows, params.dim}), kSerialWork);
  for_each_item(pool, (rows + kRows - 1) / kRows, [&](int64_t, int64_t item) {
    const int64_t begin = item * kRows, end = std::min(begin + kRows, rows);
    if (params.dtype == DType::kFloat64) {
      rotate_rows<double>(params, begin, end);
    } else {
      rotate_rows<float>(params, begin, end);
    }
  });
  return {};
}

}  // namespace pycore
