// SPDX-License-Identifier: Apache-2.0
// Vector quantization: the nearest codes of a row, residual quantization over several codebooks, the vectors of given
// codes, and the counts and sums that codebooks are learned from.
//
// A code is the nearest in float32: the one with the least distance(x, c), and of equal ones the lowest index, where
//
//   distance(x, c) = sum over i of (x[i] - c[i])^2, differences rounded to float32, in sixteen lanes: lane l holds the
//   FMA chain over i = l mod 16, ascending; lanes are added l + (l + 8), then 4, 2, 1.
//
// Every path and instruction set decides by this sum. Fast scores from the tile product only prune: what lies further
// from the best than rounding can explain is left out (cpu/vq/prune.inl.h has the bound). So a row's code depends on
// the row and the codebook alone. For cosine, x and c are first divided by their length, which is the root of the sum
// of squares in float64, by sixteen lanes again; vectors of zeros stay.
//
// Residual quantization: stage q quantizes what stages 0 .. q-1 left of x, in float32. Stages with a mask quantize x
// times their mask instead, each by itself; what they left together is where the others begin. With a beam, the
// beam_size best partial results (by distance, then by rank, then by code) go on to the next stage.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/row_view.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <atomic>
#include <cstdint>

namespace pycore {

// What a kernel found that no result can be given for: the lowest row or code of each kind. The faces make errors of
// it.
struct VqFaults {
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> not_finite_row{kNone};   // of x, counted over all its leading dimensions
  std::atomic<int64_t> not_finite_code{kNone};  // (book * stages + stage) * most codes + code
  std::atomic<int64_t> overflow_row{kNone};     // whose distance float32 does not hold

  [[gnu::always_inline]] static void note(std::atomic<int64_t>* lowest, int64_t index) {
    int64_t seen = lowest->load(std::memory_order_relaxed);
    while (index < seen && !lowest->compare_exchange_weak(seen, index, std::memory_order_relaxed)) {
    }
  }
};

struct VqEncodeParams {
  CpuIsa isa = cpu_isa();              // of the whole call, asked once: scratch and kernel must agree
  DType x_dtype = DType::kFloat32;     // float32, bfloat16 or float16, widened to float32
  DType book_dtype = DType::kFloat32;  // the same
  bool cosine = false;
  int64_t dim = 0;

  RowView x;  // [rows, dim] of book 0
  int64_t books = 1;
  int64_t x_book_stride = 0;  // from a row of one book to that of the next

  const void* codebooks = nullptr;  // [books, stages, codes, dim]; dim is contiguous
  int64_t book_stride = 0, stage_stride = 0, code_stride = 0;
  int64_t stages = 1;
  int64_t most_codes = 0;          // of any stage
  const int64_t* sizes = nullptr;  // [stages]: the codes of each, or null: most_codes

  int64_t masks = 0;                     // stages that have one, the first ones
  const float* channel_masks = nullptr;  // [masks, dim], contiguous

  int64_t beam_size = 1;
  int64_t topk = 1;          // where there is one stage
  int64_t* codes = nullptr;  // [rows, books, topk], or [rows, books, stages]
  VqFaults* faults = nullptr;

  int64_t stage_codes(int64_t stage) const { return sizes ? sizes[stage] : most_codes; }
};

struct VqDecodeParams {
  DType dtype = DType::kFloat32;  // of codebooks and out: float32, float64, bfloat16 or float16
  int64_t dim = 0, rows = 0, stages = 0;
  const int64_t* codes = nullptr;   // [rows, stages], contiguous; -1 stands for zeros. Checked.
  const void* codebooks = nullptr;  // [at least stages, codes, dim]; dim is contiguous
  int64_t stage_stride = 0, code_stride = 0;
  void* out = nullptr;  // [rows, dim], contiguous: stages added in order, in float32 (float64 for float64)
};

// counts[k] = the rows with code k, sums[k] = their sum. Sums are of float64, rows ascending, and rounded once.
struct VqStatisticsParams {
  DType dtype = DType::kFloat32;  // of x: float32, float64, bfloat16 or float16
  int64_t dim = 0, codebook_size = 0;
  RowView x;                       // [rows, dim]
  const int64_t* codes = nullptr;  // [rows], contiguous; -1 counts nowhere. Checked.
  void* counts = nullptr;          // [codebook_size], float32 (float64 for float64)
  void* sums = nullptr;            // [codebook_size, dim], the same
};

// v turned and scaled as x is onto its code (Fifty et al., arXiv 2410.06424, 4.2): with u = x/|x|, q = code/|code|, w
// halfway between and of length one, |code|/|x| (v - 2 (v w) w + 2 (v u) q), or v times that matrix transposed, where u
// and q change places. The lengths that divide are 1e-6 at least. Sums have sixteen lanes, as distance has; no FMA.
struct VqRotateParams {
  DType dtype = DType::kFloat32;  // of all: float32 or float64
  int64_t dim = 0;
  bool transpose = false;
  RowView v, x, code;   // [rows, dim] each
  void* out = nullptr;  // [rows, dim], contiguous
};

// CPU. `scratch` holds …_scratch(params, threads) bytes, 64-byte aligned; it may be null where that is zero.
PYCORE_API int64_t vq_encode_scratch(const VqEncodeParams& params, int64_t threads);
PYCORE_API Status vq_encode(const VqEncodeParams& params, const Parallel& parallel, void* scratch);
PYCORE_API Status vq_decode(const VqDecodeParams& params, const Parallel& parallel);
PYCORE_API int64_t vq_statistics_scratch(const VqStatisticsParams& params, int64_t threads);
PYCORE_API Status vq_statistics(const VqStatisticsParams& params, const Parallel& parallel, void* scratch);
PYCORE_API Status vq_rotate(const VqRotateParams& params, const Parallel& parallel);

}  // namespace pycore
