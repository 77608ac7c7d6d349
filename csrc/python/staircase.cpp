// SPDX-License-Identifier: Apache-2.0
// pycore.native.{staircase_quantize, staircase_dequantize}: the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../host/staircase_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "numbers.h"
#include "threads.h"

namespace pycore::python {
namespace {

void check_contiguous(const char* op, const char* argument, const TensorView& view) {
  int64_t row_major = 1;
  for (int i = view.dims - 1; i >= 0 && view.defined() && view.count() > 0; --i) {
    check_value(view.shape[i] == 1 || view.strides[i] == row_major, op, argument, " must be contiguous");
    row_major *= view.shape[i];
  }
}

StaircaseOptions options_of(const char* op, const py::object& bits, const py::object& group_size, const py::object& dim,
                            const std::string& grid) {
  return {integer(bits, op, "bits"), integer(group_size, op, "group_size"), integer(dim, op, "dim"), grid};
}

py::tuple quantize(py::object x, py::object bits, py::object group_size, py::object dim, const std::string& grid,
                   py::object codes, py::object lo, py::object hi, py::object centers, py::object threads) {
  constexpr const char* kOp = "staircase_quantize";
  const Array x_array = input(x, kOp, "x");
  const TensorView& view = x_array.view;
  StaircaseQuantizeParams params = staircase_quantize_params(view, options_of(kOp, bits, group_size, dim, grid));
  const std::vector<int64_t> groups = staircase_groups(view, params, params.dim);
  const Array code_array = cpu_result(codes, DType::kUInt8, {view.shape, view.shape + view.dims}, kOp, "codes");
  const Array lo_array = cpu_result(lo, params.dtype, groups, kOp, "lo");
  const Array hi_array = cpu_result(hi, params.dtype, groups, kOp, "hi");
  const Array center_array = cpu_result(centers, DType::kUInt8, groups, kOp, "centers");
  check_disjoint(
      kOp, {{"codes", code_array.view}, {"lo", lo_array.view}, {"hi", hi_array.view}, {"centers", center_array.view}},
      {{"x", view}});
  params.codes = code_array.view.as<uint8_t>();
  params.lo = lo_array.view.as<char>();
  params.hi = hi_array.view.as<char>();
  params.centers = center_array.view.as<uint8_t>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const int64_t fault = staircase_fault(params, parallel);
    if (fault >= 0) throw_staircase_fault(params, fault);
    throw_if(staircase_quantize(params, parallel), kOp);
  }
  return py::make_tuple(code_array.object, lo_array.object, hi_array.object, center_array.object);
}

py::object dequantize(py::object codes, py::object lo, py::object hi, py::object centers, py::object bits,
                      py::object group_size, py::object dim, const std::string& grid, py::object out,
                      py::object threads) {
  constexpr const char* kOp = "staircase_dequantize";
  const Array code_array = input(codes, kOp, "codes"), lo_array = input(lo, kOp, "lo"), hi_array = input(hi, kOp, "hi");
  const Array center_array = optional_input(centers, kOp, "centers");
  check_contiguous(kOp, "codes", code_array.view);
  check_contiguous(kOp, "lo", lo_array.view);
  check_contiguous(kOp, "hi", hi_array.view);
  check_contiguous(kOp, "centers", center_array.view);
  StaircaseDequantizeParams params = staircase_dequantize_params(
      code_array.view, lo_array.view, hi_array.view, center_array.view, options_of(kOp, bits, group_size, dim, grid));
  const TensorView& view = code_array.view;
  const Array out_array = cpu_result(out, params.dtype, {view.shape, view.shape + view.dims}, kOp, "out");
  check_disjoint(kOp, {{"out", out_array.view}},
                 {{"codes", view}, {"lo", lo_array.view}, {"hi", hi_array.view}, {"centers", center_array.view}});
  params.out = out_array.view.as<char>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(staircase_dequantize(params, parallel), kOp);
  }
  return out_array.object;
}

constexpr const char* kQuantizeDoc =
    R"(Quantizes groups of group_size elements along dim: see pycore.ops.staircase_quantize.

x: a float32, float16 or bfloat16 NumPy array or DLPack tensor on the CPU, last dimension contiguous. Returns (codes uint8 of
x's shape, lo, hi, centers uint8), new arrays unless given; lo, hi and centers have one element for each group. threads
defaults to all processors.)";

constexpr const char* kDequantizeDoc =
    R"(What the codes of staircase_quantize stand for: see pycore.ops.staircase_dequantize.

codes, lo, hi and centers (or None: the middle of a cell), contiguous. out, of lo's dtype, is a new array unless given.)";

}  // namespace

void register_staircase(py::module_& m) {
  const py::none none;
  m.def("staircase_quantize", &quantize, kQuantizeDoc, py::arg("x"), py::kw_only(), py::arg("bits"),
        py::arg("group_size"), py::arg("dim"), py::arg("grid") = "embedded", py::arg("codes") = none,
        py::arg("lo") = none, py::arg("hi") = none, py::arg("centers") = none, py::arg("threads") = none);
  m.def("staircase_dequantize", &dequantize, kDequantizeDoc, py::arg("codes"), py::arg("lo"), py::arg("hi"),
        py::arg("centers") = none, py::kw_only(), py::arg("bits"), py::arg("group_size"), py::arg("dim"),
        py::arg("grid") = "embedded", py::arg("out") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
