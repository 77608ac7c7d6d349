// SPDX-License-Identifier: Apache-2.0
// The vectors of codes, and the counts and sums of the rows that have each code. Plain loops in one order on every
// instruction set; a thread takes rows (decode) or channels (statistics), so threads change no sum.
#include <pycore/dtype.h>
#include <pycore/sizes.h>
#include <pycore/vq/vq.h>

#include <algorithm>

namespace pycore {
namespace {

constexpr int64_t kSerialWork = 1 << 15;
constexpr int64_t kRows = 64, kChannels = 64;  // of an item, and what is widened at a time

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

template <class Wide>
struct Loader {
  static void load(DType dtype, const void* data, int64_t at, int64_t count, Wide* out) {
    switch (dtype) {
      case DType::kFloat64: return copy(static_cast<const double*>(data) + at, count, out);
      case DType::kFloat32: return copy(static_cast<const float*>(data) + at, count, out);
      case DType::kFloat16:
        for (int64_t i = 0; i < count; ++i) out[i] = float_from_float16(static_cast<const uint16_t*>(data)[at + i]);
        return;
      default:
        for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(static_cast<const uint16_t*>(data)[at + i]);
    }
  }
  template <class T>
  static void copy(const T* from, int64_t count, Wide* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Wide>(from[i]);
  }
};

template <class Wide>
void store(DType dtype, const Wide* from, int64_t count, void* data, int64_t at) {
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case DType::kFloat64: static_cast<double*>(data)[at + i] = static_cast<double>(from[i]); break;
      case DType::kFloat32: static_cast<float*>(data)[at + i] = static_cast<float>(from[i]); break;
      case DType::kFloat16:
        static_cast<uint16_t*>(data)[at + i] = float16_from_float(static_cast<float>(from[i]));
        break;
      default: static_cast<uint16_t*>(data)[at + i] = bfloat16_from_float(static_cast<float>(from[i]));
    }
  }
}

template <class Wide>
void decode_row(const VqDecodeParams& params, int64_t row) {
  const int64_t* codes = params.codes + row * params.stages;
  Wide sum[kChannels], code[kChannels];
  for (int64_t first = 0; first < params.dim; first += kChannels) {
    const int64_t count = std::min(kChannels, params.dim - first);
    std::fill(sum, sum + count, Wide(0));
    for (int64_t q = 0; q < params.stages; ++q) {
      if (codes[q] < 0) continue;
      Loader<Wide>::load(params.dtype, params.codebooks,
                         q * params.stage_stride + codes[q] * params.code_stride + first, count, code);
      for (int64_t i = 0; i < count; ++i) sum[i] += code[i];
    }
    store(params.dtype, sum, count, params.out, row * params.dim + first);
  }
}

}  // namespace

Status vq_decode(const VqDecodeParams& params, const Parallel& parallel) {
  const Parallel pool = limited(parallel, size_product({params.rows, params.stages, params.dim}), kSerialWork);
  for_each_item(pool, parts(params.rows, kRows), [&](int64_t, int64_t item) {
    const int64_t end = std::min((item + 1) * kRows, params.rows);
    for (int64_t row = item * kRows; row < end; ++row) {
      if (params.dtype == DType::kFloat64) {
        decode_row<double>(params, row);
      } else {
        decode_row<float>(params, row);
      }
    }
  });
  return {};
}

int64_t vq_statistics_scratch(const VqStatisticsParams& params, int64_t) {
  return size_product({params.codebook_size, size_sum(params.dim, 1), 8});
}

Status vq_statistics(const VqStatisticsParams& params, const Parallel& parallel, void* scratch) {
  const DType result = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t rows = params.x.rows, dim = params.dim;
  double* const sums = static_cast<double*>(scratch);  // [codebook_size, dim]
  double* const counts =
      sums + size_product({params.codebook_size, dim});  // [codebook_size]; a float32 stands still at 2^24
  std::fill_n(counts, params.codebook_size, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    if (params.codes[row] >= 0) counts[params.codes[row]] += 1;
  }
  store(result, counts, params.codebook_size, params.counts, 0);
  const Parallel pool = limited(parallel, size_product({rows + params.codebook_size, dim}), kSerialWork);
  // Wide rows go in pieces of channels; a narrow one is a single item.
  for_each_item(pool, parts(dim, kChannels), [&](int64_t, int64_t item) {
    const int64_t first = item * kChannels, count = std::min(kChannels, dim - first);
    for (int64_t k = 0; k < params.codebook_size; ++k) std::fill_n(sums + k * dim + first, count, 0.0);
    double x[kChannels];
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t code = params.codes[row];
      if (code < 0) continue;
      Loader<double>::load(params.dtype, params.x.data, params.x.offset(row) + first, count, x);
      double* sum = sums + code * dim + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
    }
    for (int64_t k = 0; k < params.codebook_size; ++k) {
      store(result, sums + k * dim + first, count, params.sums, k * dim + first);
    }
  });
  return {};
}

}  // namespace pycore
