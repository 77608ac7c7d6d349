// SPDX-License-Identifier: Apache-2.0
// pycore.native.{vq_encode, rvq_encode, rvq_decode, vq_statistics, vq_rotate}: the kernels for NumPy arrays and DLPack
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../host/vq_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

std::vector<int64_t> leading(const TensorView& view) {
  return view.dims == 0 ? std::vector<int64_t>{} : std::vector<int64_t>{view.shape, view.shape + view.dims - 1};
}

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

// An error leaves the caller's `out` as it was.
void encode(const char* op, const char* codebook, VqEncodeParams params, const Deferred& codes,
            const Parallel& parallel) {
  params.codes = codes.as<int64_t>();
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(op, vq_encode_scratch(params, parallel.threads));
    throw_if(vq_encode(params, parallel, scratch.data), op);
  }
  throw_faults(op, codebook, params);
  codes.finish();
}

py::object vq_encode_array(py::object x, py::object codebook, std::string metric, py::object topk, py::object out,
                           py::object threads) {
  constexpr const char* kOp = "vq_encode";
  const Array x_array = input(x, kOp, "x"), codebook_array = input(codebook, kOp, "codebook");
  const int64_t count = integer(topk, kOp, "topk");
  VqFaults faults;
  const VqEncodeParams params = vq_encode_params(x_array.view, codebook_array.view, metric, count, &faults);
  const Array codes = cpu_result(out, DType::kInt64, with_last(leading(x_array.view), count), kOp, "out");
  check_disjoint(kOp, {{"out", codes.view}}, {{"x", x_array.view}, {"codebook", codebook_array.view}});
  encode(kOp, "codebook", params, Deferred(kOp, out, codes.view), thread_parallel(threads, kOp));
  return codes.object;
}

std::optional<std::vector<int64_t>> optional_integers(const py::object& sizes, const char* op) {
  return sizes.is_none() ? std::nullopt : std::optional<std::vector<int64_t>>(integers(sizes, op, "sizes"));
}

py::object rvq_encode(py::object x, py::object codebooks, py::object sizes, py::object num_quantizers,
                      std::string metric, py::object beam_size, py::object channel_masks, py::object out,
                      py::object threads) {
  constexpr const char* kOp = "rvq_encode";
  const Array x_array = input(x, kOp, "x"), books_array = input(codebooks, kOp, "codebooks");
  const Array masks = small_input(channel_masks, kOp, "channel_masks", 0, false);
  const auto of_stage = optional_integers(sizes, kOp);
  VqFaults faults;
  const VqEncodeParams params = rvq_encode_params(x_array.view, books_array.view, of_stage,
                                                  optional_integer(num_quantizers, kOp, "num_quantizers"), metric,
                                                  integer(beam_size, kOp, "beam_size"), masks.view, &faults);
  const Array codes = cpu_result(out, DType::kInt64, with_last(leading(x_array.view), params.stages), kOp, "out");
  check_disjoint(kOp, {{"out", codes.view}},
                 {{"x", x_array.view}, {"codebooks", books_array.view}, {"channel_masks", masks.view}});
  encode(kOp, "codebooks", params, Deferred(kOp, out, codes.view), thread_parallel(threads, kOp));
  return codes.object;
}

py::object rvq_decode(py::object codes, py::object codebooks, py::object sizes, py::object out, py::object threads) {
  constexpr const char* kOp = "rvq_decode";
  const Array codes_array = small_input(codes, kOp, "codes", 0, true), books_array = input(codebooks, kOp, "codebooks");
  const auto of_stage = optional_integers(sizes, kOp);
  IndexCopies copies;
  VqDecodeParams params = rvq_decode_params(codes_array.view, books_array.view, of_stage, &copies);
  const Array result = cpu_result(out, params.dtype, with_last(leading(codes_array.view), params.dim), kOp, "out");
  check_disjoint(kOp, {{"out", result.view}}, {{"codes", codes_array.view}, {"codebooks", books_array.view}});
  params.out = result.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(vq_decode(params, parallel), kOp);
  }
  return result.object;
}

py::tuple vq_statistics_array(py::object x, py::object codes, py::object codebook_size, py::object counts,
                              py::object sums, py::object threads) {
  constexpr const char* kOp = "vq_statistics";
  const Array x_array = input(x, kOp, "x"), codes_array = small_input(codes, kOp, "codes", 0, true);
  const int64_t size = integer(codebook_size, kOp, "codebook_size");
  IndexCopies copies;
  VqStatisticsParams params = vq_statistics_params(x_array.view, codes_array.view, size, &copies);
  const DType type = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const Array counts_array = cpu_result(counts, type, {size}, kOp, "counts");
  const Array sums_array = cpu_result(sums, type, {size, params.dim}, kOp, "sums");
  check_disjoint(kOp, {{"counts", counts_array.view}, {"sums", sums_array.view}},
                 {{"x", x_array.view}, {"codes", codes_array.view}});
  params.counts = counts_array.view.data;
  params.sums = sums_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, vq_statistics_scratch(params, parallel.threads));
    throw_if(vq_statistics(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(counts_array.object, sums_array.object);
}

py::object vq_rotate_array(py::object v, py::object x, py::object code, bool transpose, py::object out,
                           py::object threads) {
  constexpr const char* kOp = "vq_rotate";
  const Array v_array = input(v, kOp, "v"), x_array = input(x, kOp, "x"), code_array = input(code, kOp, "code");
  VqRotateParams params = vq_rotate_params(v_array.view, x_array.view, code_array.view, transpose);
  const Array result = cpu_result(out, params.dtype, with_last(leading(v_array.view), params.dim), kOp, "out");
  check_disjoint(kOp, {{"out", result.view}}, {{"v", v_array.view}, {"x", x_array.view}, {"code", code_array.view}});
  params.out = result.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(vq_rotate(params, parallel), kOp);
  }
  return result.object;
}

constexpr const char* kEncodeDoc = R"(The codes nearest to each row: see pycore.ops.vq_encode.

x [..., D] and codebook [K, D], or x [..., C, D] and codebook [C, K, D]: float32, bfloat16 or float16 NumPy arrays or DLPack
tensors on the CPU, last dimension contiguous. metric is euclidean or cosine. Returns int64 [..., topk].)";

constexpr const char* kRvqEncodeDoc = R"(The codes of residual quantization: see pycore.ops.rvq_encode.

x [..., D], codebooks [Q, K, D], of which sizes, [Q] or None, says how many codes of each stage there are; channel_masks [M, D]
float32 or None. Returns int64 [..., num_quantizers or Q].)";

constexpr const char* kDecodeDoc = R"(The sum of the codes' vectors: see pycore.ops.rvq_decode.

codes [..., n] int64, codebooks [Q, K, D] of float32, float64, bfloat16 or float16, sizes as for rvq_encode. Returns [..., D].)";

constexpr const char* kStatisticsDoc = R"(Counts and sums of the rows that have each code: see pycore.ops.vq_statistics.

x [..., D], codes [...] int64. Returns (counts [codebook_size], sums [codebook_size, D]), float32, or float64 for float64.)";

constexpr const char* kRotateDoc = R"(v turned and scaled as x is onto code: see pycore.ops.vq_rotate.

v, x and code [..., D], float32 or float64. Returns [..., D].)";

}  // namespace

void register_vq(py::module_& m) {
  const py::none none;
  m.def("vq_encode", &vq_encode_array, kEncodeDoc, py::arg("x"), py::arg("codebook"), py::kw_only(),
        py::arg("metric") = "euclidean", py::arg("topk") = 1, py::arg("out") = none, py::arg("threads") = none);
  m.def("rvq_encode", &rvq_encode, kRvqEncodeDoc, py::arg("x"), py::arg("codebooks"), py::kw_only(),
        py::arg("sizes") = none, py::arg("num_quantizers") = none, py::arg("metric") = "euclidean",
        py::arg("beam_size") = 1, py::arg("channel_masks") = none, py::arg("out") = none, py::arg("threads") = none);
  m.def("rvq_decode", &rvq_decode, kDecodeDoc, py::arg("codes"), py::arg("codebooks"), py::kw_only(),
        py::arg("sizes") = none, py::arg("out") = none, py::arg("threads") = none);
  m.def("vq_statistics", &vq_statistics_array, kStatisticsDoc, py::arg("x"), py::arg("codes"), py::arg("codebook_size"),
        py::kw_only(), py::arg("counts") = none, py::arg("sums") = none, py::arg("threads") = none);
  m.def("vq_rotate", &vq_rotate_array, kRotateDoc, py::arg("v"), py::arg("x"), py::arg("code"), py::kw_only(),
        py::arg("transpose") = false, py::arg("out") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
