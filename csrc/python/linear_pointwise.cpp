// SPDX-License-Identifier: Apache-2.0
// pycore.native.{rotary_tables, rotate, softcap}: the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../host/linear_pointwise_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

std::vector<int64_t> shape_of(const TensorView& view) { return {view.shape, view.shape + view.dims}; }

py::tuple rotary_tables(py::object positions, py::object frequencies, bool wide, py::object cos, py::object sin,
                        py::object threads) {
  constexpr const char* kOp = "rotary_tables";
  const Array positions_array = input(positions, kOp, "positions");
  const Array frequencies_array = input(frequencies, kOp, "frequencies");
  check_rotary_tables(kOp, positions_array.view, frequencies_array.view);
  RotaryTablesParams params = rotary_tables_params(positions_array.view, frequencies_array.view, wide);
  std::vector<int64_t> shape = shape_of(positions_array.view);
  shape.push_back(params.pairs);
  const Array cos_array = cpu_result(cos, params.dtype, shape, kOp, "cos");
  const Array sin_array = cpu_result(sin, params.dtype, shape, kOp, "sin");
  check_disjoint(kOp, {{"cos", cos_array.view}, {"sin", sin_array.view}},
                 {{"positions", positions_array.view}, {"frequencies", frequencies_array.view}});
  params.cos = cos_array.view.data;
  params.sin = sin_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(pycore::rotary_tables(params, parallel), kOp);
  }
  return py::make_tuple(cos_array.object, sin_array.object);
}

py::object rotate(py::object x, py::object cos, py::object sin, bool inverse, py::object out, py::object threads) {
  constexpr const char* kOp = "rotate";
  const Array x_array = input(x, kOp, "x"), cos_array = input(cos, kOp, "cos"), sin_array = input(sin, kOp, "sin");
  check_rotate(kOp, x_array.view, cos_array.view, sin_array.view);
  RotateParams params = rotate_params(x_array.view, cos_array.view, sin_array.view, inverse);
  const Array out_array = cpu_result(out, params.dtype, shape_of(x_array.view), kOp, "out");
  check_disjoint(kOp, {{"out", out_array.view}},
                 {{"x", x_array.view}, {"cos", cos_array.view}, {"sin", sin_array.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(rotate_forward(params, parallel), kOp);
  }
  return out_array.object;
}

py::object softcap_of(const char* op, const Array& x, const Array& grad_out, double cap, const py::object& out,
                      const char* result, const py::object& threads) {
  check_softcap(op, x.view, cap);
  if (grad_out.view.defined()) check_grad_out(op, grad_out.view, x.view, x.view.shape[x.view.dims - 1]);
  SoftcapParams params = softcap_params(x.view, grad_out.view, cap);
  const Array out_array = cpu_result(out, params.dtype, shape_of(x.view), op, result);
  check_disjoint(op, {{result, out_array.view}}, {{"x", x.view}, {"grad_out", grad_out.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, op);
  {
    const py::gil_scoped_release release;
    throw_if(softcap_forward(params, parallel), op);
  }
  return out_array.object;
}

py::object softcap(py::object x, double cap, py::object out, py::object threads) {
  return softcap_of("softcap", input(x, "softcap", "x"), Array{}, cap, out, "out", threads);
}

py::object softcap_backward(py::object grad_out, py::object x, double cap, py::object grad_x, py::object threads) {
  constexpr const char* kOp = "softcap_backward";
  const Array grad_array = input(grad_out, kOp, "grad_out");
  return softcap_of(kOp, input(x, kOp, "x"), grad_array, cap, grad_x, "grad_x", threads);
}

constexpr const char* kRotaryTablesDoc =
    R"(Cosine and sine of positions times frequencies, of one formula: see pycore.ops.rotary_tables.

positions int64 [...], frequencies float64 [P]: contiguous NumPy arrays or DLPack tensors on the CPU. wide: float64 in
place of float32. cos and sin are new arrays unless given. Returns (cos, sin), [..., P].)";

constexpr const char* kRotateDoc = R"(Pairs of channels (i, i + P) turned by tables: see pycore.ops.rotate.

x [B, H, L, C] of a floating dtype, last dimension contiguous; cos and sin [B or 1, L, P] contiguous, float64 where x
is, else float32. inverse turns back. out is a new array unless given. Returns [B, H, L, C].)";

constexpr const char* kSoftcapDoc = R"(cap tanh(x / cap): see pycore.ops.softcap.

x [..., C] of a floating dtype, last dimension contiguous. out is a new array unless given. Returns [..., C].)";

constexpr const char* kSoftcapBackwardDoc = R"(Gradient of `softcap`: grad_x, a new array unless given.)";

}  // namespace

void register_linear_pointwise(py::module_& m) {
  const py::none none;
  m.def("rotary_tables", &rotary_tables, kRotaryTablesDoc, py::arg("positions"), py::arg("frequencies"),
        py::arg("wide") = false, py::kw_only(), py::arg("cos") = none, py::arg("sin") = none,
        py::arg("threads") = none);
  m.def("rotate", &rotate, kRotateDoc, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("inverse") = false,
        py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("softcap", &softcap, kSoftcapDoc, py::arg("x"), py::arg("cap"), py::kw_only(), py::arg("out") = none,
        py::arg("threads") = none);
  m.def("softcap_backward", &softcap_backward, kSoftcapBackwardDoc, py::arg("grad_out"), py::arg("x"), py::arg("cap"),
        py::kw_only(), py::arg("grad_x") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
