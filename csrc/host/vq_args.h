// SPDX-License-Identifier: Apache-2.0
// What the two faces refuse for the vq ops, and how they fill the parameter structs. Views of tensors that are not
// given are not defined().
#pragma once

#include <pycore/vq/vq.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

namespace vq {

inline constexpr int64_t kMostBeams = 16;

inline void check_dtype(const char* op, const char* argument, const TensorView& view, bool with_float64) {
  check_value(view.device == Device::kCpu, op, argument, " is not on the CPU, which is where this op has kernels");
  const bool fits = view.dtype == DType::kFloat32 || view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat16 ||
                    (with_float64 && view.dtype == DType::kFloat64);
  check_value(fits, op, argument, " has dtype ", dtype_name(view.dtype), " and must have float32, bfloat16 or float16",
              with_float64 ? ", or float64" : "");
}

inline void check_last_contiguous(const char* op, const char* argument, const TensorView& view) {
  const int last = view.dims - 1;
  if (view.count() == 0) return;  // strides of no elements mean nothing
  check_value(view.shape[last] <= 1 || view.strides[last] == 1, op, argument, " has stride ", view.strides[last],
              " in its last dimension, which must be contiguous");
}

inline bool is_cosine(const char* op, const std::string& metric) {
  check_value(metric == "euclidean" || metric == "cosine", op, "metric is '", metric,
              "' and must be euclidean or cosine");
  return metric == "cosine";
}

inline void check_x(const char* op, const TensorView& x, int64_t dim, const char* of) {
  check_dtype(op, "x", x, false);
  check_value(x.dims >= 1, op, "x is a scalar and must have shape [..., D]");
  check_value(x.shape[x.dims - 1] == dim, op, "x has ", x.shape[x.dims - 1], " channels and must have ", of, "'s ",
              dim);
  check_last_contiguous(op, "x", x);
}

// Codes are read where they lie: [..., n] without gaps.
inline void check_codes(const char* op, const TensorView& codes) {
  check_value(codes.device == Device::kCpu, op, "codes is not on the CPU, which is where this op has kernels");
  check_value(codes.dtype == DType::kInt64, op, "codes has dtype ", dtype_name(codes.dtype), " and must have int64");
  int64_t row_major = 1;
  for (int i = codes.dims - 1; i >= 0 && codes.count() > 0; --i) {
    check_value(codes.shape[i] == 1 || codes.strides[i] == row_major, op, "codes must be contiguous");
    row_major *= codes.shape[i];
  }
}

}  // namespace vq

// x [..., D] and codebook [K, D], or x [..., C, D] and codebook [C, K, D].
inline VqEncodeParams vq_encode_params(const TensorView& x, const TensorView& codebook, const std::string& metric,
                                       int64_t topk, VqFaults* faults) {
  constexpr const char* kOp = "vq_encode";
  VqEncodeParams params;
  params.cosine = vq::is_cosine(kOp, metric);
  vq::check_dtype(kOp, "codebook", codebook, false);
  check_value(codebook.dims == 2 || codebook.dims == 3, kOp, "codebook has shape ", shape_text(codebook),
              " and must be [codes, channels] or [books, codes, channels]");
  const int first = codebook.dims - 2;
  params.most_codes = codebook.shape[first];
  params.dim = codebook.shape[first + 1];
  vq::check_x(kOp, x, params.dim, "codebook");
  vq::check_last_contiguous(kOp, "codebook", codebook);
  check_value(params.most_codes >= 1, kOp, "codebook has shape ", shape_text(codebook), " and must have a code");
  check_value(params.dim >= 1, kOp, "codebook has shape ", shape_text(codebook), " and must have a channel");
  check_value(topk >= 1 && topk <= params.most_codes, kOp, "topk is ", topk, " and must be 1 to codebook's ",
              params.most_codes, " codes");
  TensorView rows = x;
  if (codebook.dims == 3) {
    check_value(x.dims >= 2 && x.shape[x.dims - 2] == codebook.shape[0], kOp, "x has shape ", shape_text(x),
                " and must have codebook's ", codebook.shape[0], " books in its last dimension but one");
    params.books = codebook.shape[0];
    params.book_stride = codebook.strides[0];
    params.x_book_stride = x.strides[x.dims - 2];
    rows.shape[x.dims - 2] = 1;
  }
  params.x_dtype = x.dtype;
  params.book_dtype = codebook.dtype;
  params.x = row_view(rows);
  params.codebooks = codebook.data;
  params.code_stride = codebook.strides[first];
  params.topk = topk;
  params.faults = faults;
  return params;
}

// The codes of each stage, checked; null where they are not given.
inline const int64_t* stage_sizes(const char* op, const TensorView& codebooks,
                                  const std::optional<std::vector<int64_t>>& sizes) {
  if (!sizes.has_value()) return nullptr;
  const int64_t stages = codebooks.shape[0], most = codebooks.shape[1];
  check_value(static_cast<int64_t>(sizes->size()) == stages, op, "sizes has ", sizes->size(),
              " entries and must have one for each of codebooks' ", stages, " stages");
  for (int64_t q = 0; q < stages; ++q) {
    check_value((*sizes)[q] >= 1 && (*sizes)[q] <= most, op, "sizes has ", (*sizes)[q], " for stage ", q,
                " and must have 1 to codebooks' ", most);
  }
  return sizes->data();
}

inline void check_codebooks(const char* op, const TensorView& codebooks, bool with_float64) {
  vq::check_dtype(op, "codebooks", codebooks, with_float64);
  check_value(codebooks.dims == 3, op, "codebooks has shape ", shape_text(codebooks),
              " and must be [stages, codes, channels]");
  for (int i = 0; i < 3; ++i) {
    check_value(codebooks.shape[i] >= 1, op, "codebooks has shape ", shape_text(codebooks), " and must have no ",
                "dimension of size 0");
  }
  vq::check_last_contiguous(op, "codebooks", codebooks);
}

// x [..., D], codebooks [Q, K, D], channel_masks [M, D] of float32 or absent; `stages` of them are used. Both `sizes`
// and `channel_masks` must outlive the call.
inline VqEncodeParams rvq_encode_params(const TensorView& x, const TensorView& codebooks,
                                        const std::optional<std::vector<int64_t>>& sizes,
                                        std::optional<int64_t> num_quantizers, const std::string& metric,
                                        int64_t beam_size, const TensorView& channel_masks, VqFaults* faults) {
  constexpr const char* kOp = "rvq_encode";
  VqEncodeParams params;
  params.cosine = vq::is_cosine(kOp, metric);
  check_codebooks(kOp, codebooks, false);
  params.dim = codebooks.shape[2];
  vq::check_x(kOp, x, params.dim, "codebooks");
  params.sizes = stage_sizes(kOp, codebooks, sizes);
  params.stages = num_quantizers.value_or(codebooks.shape[0]);
  check_value(params.stages >= 1 && params.stages <= codebooks.shape[0], kOp, "num_quantizers is ", params.stages,
              " and must be 1 to codebooks' ", codebooks.shape[0], " stages");
  check_value(beam_size >= 1 && beam_size <= vq::kMostBeams, kOp, "beam_size is ", beam_size, " and must be 1 to ",
              vq::kMostBeams);
  if (channel_masks.defined()) {
    check_value(channel_masks.device == Device::kCpu, kOp, "channel_masks is not on the CPU, where x is");
    check_value(channel_masks.dtype == DType::kFloat32, kOp, "channel_masks has dtype ",
                dtype_name(channel_masks.dtype), " and must have bool or float32");
    check_value(
        channel_masks.dims == 2 && channel_masks.shape[1] == params.dim && channel_masks.shape[0] <= codebooks.shape[0],
        kOp, "channel_masks has shape ", shape_text(channel_masks), " and must be [at most ", codebooks.shape[0],
        " stages, ", params.dim, " channels]");
    check_value(channel_masks.count() == 0 || ((channel_masks.strides[1] == 1 || params.dim == 1) &&
                                               (channel_masks.strides[0] == params.dim || channel_masks.shape[0] == 1)),
                kOp, "channel_masks must be contiguous");
    const float* mask = channel_masks.as<const float>();
    for (int64_t i = 0; i < channel_masks.count(); ++i) {
      check_value(mask[i] - mask[i] == 0, kOp, "channel_masks has ", mask[i], " for stage ", i / params.dim,
                  " and must be finite");
    }
    params.masks = channel_masks.shape[0] < params.stages ? channel_masks.shape[0] : params.stages;
    params.channel_masks = mask;
  }
  params.x_dtype = x.dtype;
  params.book_dtype = codebooks.dtype;
  params.x = row_view(x);
  params.codebooks = codebooks.data;
  params.stage_stride = codebooks.strides[0];
  params.code_stride = codebooks.strides[1];
  params.most_codes = codebooks.shape[1];
  params.beam_size = beam_size;
  params.topk = 1;
  params.faults = faults;
  return params;
}

// After the kernel: what it found, as an error.
inline void throw_faults(const char* op, const char* codebook, const VqEncodeParams& params) {
  const VqFaults& faults = *params.faults;
  const int64_t code = faults.not_finite_code, row = faults.not_finite_row, overflow = faults.overflow_row;
  if (code != VqFaults::kNone) {
    const int64_t which = code / params.most_codes, stages = params.books > 1 ? params.books : params.stages;
    const std::string of =
        stages > 1 ? std::string(params.books > 1 ? " of book " : " of stage ") + std::to_string(which) : std::string();
    check_value(false, op, codebook, " has NaN or an infinity in code ", code % params.most_codes, of,
                " and must be finite");
  }
  check_value(row == VqFaults::kNone, op, "x has NaN or an infinity in row ", row, " and must be finite");
  check_value(overflow == VqFaults::kNone, op, "x has row ", overflow,
              " so far from every code that float32 does not hold the distance, and must be nearer");
}

// codes [..., n], codebooks [Q, K, D], n <= Q. Copies the codes: what is checked is what the kernel reads.
inline VqDecodeParams rvq_decode_params(const TensorView& codes, const TensorView& codebooks,
                                        const std::optional<std::vector<int64_t>>& sizes, IndexCopies* copies) {
  constexpr const char* kOp = "rvq_decode";
  check_codebooks(kOp, codebooks, true);
  vq::check_codes(kOp, codes);
  check_value(codes.dims >= 1, kOp, "codes is a scalar and must have shape [..., stages]");
  const int64_t stages = codes.shape[codes.dims - 1];
  check_value(stages <= codebooks.shape[0], kOp, "codes has ", stages, " stages and must have at most codebooks' ",
              codebooks.shape[0]);
  const int64_t* of_stage = stage_sizes(kOp, codebooks, sizes);
  const int64_t* kept = copies->keep(kOp, codes.as<const int64_t>(), codes.count());
  for (int64_t i = 0; i < codes.count(); ++i) {
    const int64_t limit = of_stage ? of_stage[i % stages] : codebooks.shape[1];
    check_index(kept[i] >= -1 && kept[i] < limit, kOp, "codes has ", kept[i], " at stage ", i % stages,
                " and must have -1 to ", limit - 1);
  }
  VqDecodeParams params;
  params.dtype = codebooks.dtype;
  params.dim = codebooks.shape[2];
  params.rows = 1;
  for (int i = 0; i + 1 < codes.dims; ++i) params.rows *= codes.shape[i];
  params.stages = stages;
  params.codes = kept;
  params.codebooks = codebooks.data;
  params.stage_stride = codebooks.strides[0];
  params.code_stride = codebooks.strides[1];
  return params;
}

// x [..., D], codes [...].
inline VqStatisticsParams vq_statistics_params(const TensorView& x, const TensorView& codes, int64_t codebook_size,
                                               IndexCopies* copies) {
  constexpr const char* kOp = "vq_statistics";
  vq::check_dtype(kOp, "x", x, true);
  check_value(x.dims >= 1, kOp, "x is a scalar and must have shape [..., D]");
  vq::check_last_contiguous(kOp, "x", x);
  vq::check_codes(kOp, codes);
  TensorView rows = x;
  rows.dims -= 1;
  check_value(same_shape(rows, codes), kOp, "codes has shape ", shape_text(codes), " and must have ", shape_text(rows),
              ", x's without the channels");
  check_value(codebook_size >= 1, kOp, "codebook_size is ", codebook_size, " and must be at least 1");
  const int64_t* kept = copies->keep(kOp, codes.as<const int64_t>(), codes.count());
  for (int64_t i = 0; i < codes.count(); ++i) {
    check_index(kept[i] >= -1 && kept[i] < codebook_size, kOp, "codes has ", kept[i], " and must have -1 to ",
                codebook_size - 1);
  }
  VqStatisticsParams params;
  params.dtype = x.dtype;
  params.dim = x.shape[x.dims - 1];
  params.codebook_size = codebook_size;
  params.x = row_view(x);
  params.codes = kept;
  return params;
}

// v, x and code [..., D], all of one shape and dtype.
inline VqRotateParams vq_rotate_params(const TensorView& v, const TensorView& x, const TensorView& code,
                                       bool transpose) {
  constexpr const char* kOp = "vq_rotate";
  const std::pair<const char*, const TensorView*> given[] = {{"v", &v}, {"x", &x}, {"code", &code}};
  for (const auto& [argument, view] : given) {
    check_value(view->device == Device::kCpu, kOp, argument, " is not on the CPU, which is where this op has kernels");
    check_value(view->dtype == DType::kFloat32 || view->dtype == DType::kFloat64, kOp, argument, " has dtype ",
                dtype_name(view->dtype), " and must have float32 or float64");
    check_value(view->dtype == v.dtype, kOp, argument, " has dtype ", dtype_name(view->dtype), " and must have v's ",
                dtype_name(v.dtype));
    check_value(view->dims >= 1, kOp, argument, " is a scalar and must have shape [..., D]");
    check_value(same_shape(*view, v), kOp, argument, " has shape ", shape_text(*view), " and must have v's ",
                shape_text(v));
    vq::check_last_contiguous(kOp, argument, *view);
  }
  VqRotateParams params;
  params.dtype = v.dtype;
  params.dim = v.shape[v.dims - 1];
  params.transpose = transpose;
  params.v = row_view(v);
  params.x = row_view(x);
  params.code = row_view(code);
  return params;
}

}  // namespace pycore
