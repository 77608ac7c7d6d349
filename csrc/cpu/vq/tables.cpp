// SPDX-License-Identifier: Apache-2.0
// The vectors of codes, and the counts and sums of the rows that have each code. Plain loops in one order on every
// instruction set; a thread takes rows (decode) or codes and channels (statistics), so threads change no sum.
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

template <class Wide, class T>
void narrow(const Wide* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

template <class Wide>
void store(DType dtype, const Wide* from, int64_t count, void* data, int64_t at) {
  switch (dtype) {
    case DType::kFloat64: return narrow(from, count, static_cast<double*>(data) + at);
    case DType::kFloat32: return narrow(from, count, static_cast<float*>(data) + at);
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<uint16_t*>(data)[at + i] = float16_from_float(static_cast<float>(from[i]));
      }
      return;
    default:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<uint16_t*>(data)[at + i] = bfloat16_from_float(static_cast<float>(from[i]));
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
  return size_product({size_sum(params.x.rows, size_sum(params.codebook_size, 1)), 8});
}

Status vq_statistics(const VqStatisticsParams& params, const Parallel& parallel, void* scratch) {
  const DType result = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t rows = params.x.rows, dim = params.dim, codes = params.codebook_size;
  // The rows by their code, and ascending: those of code k are order[ends[k - 1]] to order[ends[k] - 1]. So a sum stays
  // in registers and is written once.
  int64_t* const ends = static_cast<int64_t*>(scratch);  // [codes + 1]; while rows are placed, ends[k] is k's first
  int64_t* const order = ends + codes + 1;               // [rows]
  std::fill_n(ends, codes + 1, int64_t{0});
  for (int64_t row = 0; row < rows; ++row) {
    if (params.codes[row] >= 0) ++ends[params.codes[row] + 1];
  }
  for (int64_t k = 0; k < codes; ++k) {
    const double count = static_cast<double>(ends[k + 1]);
    store(result, &count, 1, params.counts, k);
    ends[k + 1] += ends[k];
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (params.codes[row] >= 0) order[ends[params.codes[row]]++] = row;
  }
  const Parallel pool = limited(parallel, size_product({size_sum(rows, codes), dim}), kSerialWork);
  // The channels are cut too, as one code may have all the rows.
  const int64_t pieces = parts(dim, kChannels);
  for_each_item(pool, size_product({parts(codes, kRows), pieces}), [&](int64_t, int64_t item) {
    const int64_t first = item % pieces * kChannels, count = std::min(kChannels, dim - first);
    const int64_t begin = item / pieces * kRows, end = std::min(begin + kRows, codes);
    double sum[kChannels], x[kChannels];
    for (int64_t k = begin; k < end; ++k) {
      std::fill_n(sum, count, 0.0);
      for (int64_t at = k > 0 ? ends[k - 1] : 0; at < ends[k]; ++at) {
        Loader<double>::load(params.dtype, params.x.data, params.x.offset(order[at]) + first, count, x);
        for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
      }
      store(result, sum, count, params.sums, k * dim + first);
    }
  });
  return {};
}

}  // namespace pycore
