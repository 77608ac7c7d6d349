// SPDX-License-Identifier: Apache-2.0
// pycore.native.{window_counts, window_encode, window_decode}: the steps that pycore.EqualInfoWindows is made of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../host/arithmetic_coding_windows_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

py::tuple counts(py::object probs, py::object threads) {
  constexpr const char* kOp = "window_counts";
  const Array array = input(probs, kOp, "probs");
  WindowCountsParams params = window_counts_params(kOp, array.view);
  const int64_t rows = params.probs.rows;
  const Array sums = cpu_result(py::none(), DType::kInt64, {rows, params.symbols + 1}, kOp, "cumulative");
  const Array faults = cpu_result(py::none(), DType::kInt32, {rows}, kOp, "faults");
  params.cumulative = sums.view.as<int64_t>();
  static_assert(sizeof(WindowFault) == sizeof(int32_t));
  params.faults = faults.view.as<WindowFault>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    std::memset(sums.view.data, 0, static_cast<size_t>(sums.view.count()) * sizeof(int64_t));
    throw_if(window_counts(params, parallel), kOp);
  }
  return py::make_tuple(sums.object, faults.object);
}

struct Step {
  Array sums, rows, start, size, in, new_start, new_size;
  IndexCopies copies;
  WindowStepParams params;

  Step(const char* op, const py::object& cumulative, const py::object& rows_object, const py::object& start_object,
       const py::object& size_object, const char* argument, const py::object& in_object, const py::object& bits,
       bool decoding)
      : sums(input(cumulative, op, "cumulative")),
        rows(input(rows_object, op, "rows")),
        start(input(start_object, op, "start")),
        size(input(size_object, op, "size")),
        in(input(in_object, op, argument)),
        params(window_step_params(op, sums.view, rows.view, start.view, size.view, argument, in.view,
                                  integer(bits, op, "bits"), decoding, &copies)) {
    new_start = copy_of(op, &params.start);
    new_size = copy_of(op, &params.size);
  }

  // *data: in, what was checked; out, where the step may write.
  Array copy_of(const char* op, int64_t** data) const {
    Array out = cpu_result(py::none(), DType::kInt64, {params.walks}, op, "out");
    if (params.walks) std::memcpy(out.view.data, *data, static_cast<size_t>(params.walks) * sizeof(int64_t));
    *data = out.view.as<int64_t>();
    return out;
  }
};

py::tuple encode(py::object cumulative, py::object rows, py::object start, py::object size, py::object symbols,
                 py::object bits, py::object threads) {
  constexpr const char* kOp = "window_encode";
  Step step(kOp, cumulative, rows, start, size, "symbols", symbols, bits, false);
  const Array moved = cpu_result(py::none(), DType::kUInt8, {step.params.walks}, kOp, "moved");
  step.params.moved = moved.view.as<uint8_t>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(window_encode(step.params, parallel), kOp);
  }
  return py::make_tuple(moved.object, step.new_start.object, step.new_size.object);
}

py::tuple decode(py::object cumulative, py::object rows, py::object start, py::object size, py::object tokens,
                 py::object bits, py::object threads) {
  constexpr const char* kOp = "window_decode";
  Step step(kOp, cumulative, rows, start, size, "tokens", tokens, bits, true);
  const Array symbols = cpu_result(py::none(), DType::kInt64, {step.params.walks}, kOp, "symbols");
  step.params.symbols_out = symbols.view.as<int64_t>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(window_decode(step.params, parallel), kOp);
  }
  return py::make_tuple(symbols.object, step.new_start.object, step.new_size.object);
}

constexpr const char* kCountsDoc = R"(The counts of quantize_cdf, added up: exact, and not yet scaled to a precision.

probs [rows, V], V from 2 to 65,536: float32, float64, float16 or bfloat16. Returns (cumulative, faults): int64
[rows, V + 1] and int32 [rows], 0 for a good row, 1 for one with NaN, infinity or a negative entry, 2 for one that sums to
zero; the row of cumulative then means nothing.)";

constexpr const char* kEncodeDoc = R"(One step of many windows: see pycore.EqualInfoWindows.

cumulative int64 [rows, V + 1] from window_counts; rows, start, size and symbols int64 [walks]: the row of each walk's
node, its interval of the 2^bits codewords (size >= 2), and the symbol to go on with. Returns (moved, start, size): uint8
[walks], 0 where the symbol has no share, and the new intervals.)";

constexpr const char* kDecodeDoc = R"(One step of many windows, back: see pycore.EqualInfoWindows.

As window_encode, with the codewords, which lie inside their nodes, in place of symbols. Returns (symbols, start, size):
the symbol each codeword belongs to, or -1 where it is the node's own and the walk ends.)";

}  // namespace

void register_arithmetic_coding_windows(py::module_& m) {
  const py::none none;
  m.def("window_counts", &counts, kCountsDoc, py::arg("probs"), py::kw_only(), py::arg("threads") = none);
  m.def("window_encode", &encode, kEncodeDoc, py::arg("cumulative"), py::arg("rows"), py::arg("start"), py::arg("size"),
        py::arg("symbols"), py::kw_only(), py::arg("bits"), py::arg("threads") = none);
  m.def("window_decode", &decode, kDecodeDoc, py::arg("cumulative"), py::arg("rows"), py::arg("start"), py::arg("size"),
        py::arg("tokens"), py::kw_only(), py::arg("bits"), py::arg("threads") = none);
}

}  // namespace pycore::python
