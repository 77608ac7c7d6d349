// SPDX-License-Identifier: Apache-2.0
// pycore.native.staircase_attention, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../host/staircase_attention_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "numbers.h"
#include "staircase_storage.h"
#include "threads.h"

namespace pycore::python {
namespace {

py::tuple attend(py::object query, py::sequence key_storage, py::sequence value_storage, py::object ends,
                 py::object distance_bias, py::object sink_logits, py::object key_bits, py::object value_bits,
                 py::object sink_size, py::object step, py::object group_size, const std::string& grid,
                 const std::string& schedule, py::object schedule_args, std::optional<double> scale, double softcap,
                 py::object out, py::object threads) {
  constexpr const char* kOp = "staircase_attention";
  const StaircaseStorage keys(key_storage, false, kOp, "key_storage"),
      values(value_storage, false, kOp, "value_storage");
  const Array read[] = {input(query, kOp, "query"), small_input(ends, kOp, "ends", 0, true),
                        optional_input(distance_bias, kOp, "distance_bias"),
                        optional_input(sink_logits, kOp, "sink_logits")};
  StaircaseAttentionArgs args;
  args.query = read[0].view;
  args.key_storage = keys.views.data();
  args.value_storage = values.views.data();
  args.ends = read[1].view;
  args.distance_bias = read[2].view;
  args.sink_logits = read[3].view;
  args.ladder = {integers(key_bits, kOp, "key_bits"), integer(sink_size, kOp, "sink_size"), integer(step, kOp, "step"),
                 integer(group_size, kOp, "group_size"), grid};
  args.value_bits = integers(value_bits, kOp, "value_bits");
  args.schedule = schedule;
  args.schedule_args = integers(schedule_args, kOp, "schedule_args");
  args.scale = scale.value_or(args.query.dims == 4 ? 1 / std::sqrt(static_cast<double>(args.query.shape[3])) : 1.0);
  args.softcap = softcap;
  StaircaseAttentionMemory memory;
  AttentionParams params = staircase_attention_params(args, &memory);
  const Array result =
      cpu_result(out, DType::kFloat32, {params.batch, params.heads, params.query_length, params.value_dim}, kOp, "out");
  const Array lse =
      cpu_result(py::none(), DType::kFloat32, {params.batch, params.heads, params.query_length}, kOp, "lse");
  std::vector<NamedView> inputs = {{"query", read[0].view}, {"ends", read[1].view}};
  for (const TensorView& view : keys.views) inputs.push_back({"key_storage", view});
  for (const TensorView& view : values.views) inputs.push_back({"value_storage", view});
  check_disjoint(kOp, std::vector<NamedView>{{"out", result.view}}, inputs);
  params.out = result.view.data;
  params.lse = lse.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, attention_forward_scratch(params, parallel.threads));
    throw_if(attention_forward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(result.object, lse.object);
}

constexpr const char* kDoc = R"(Attention of queries on a staircase cache, which stays packed.

query float32 [B, H, n, D], all of a row in one step of the ladder, the last one the newest token it reads; storage as for
staircase_cache_append; ends int64 [B], tokens that each row's last query reads; schedule "causal" or "lambda" with
(sink_size, window_size); group_size 64. Returns (out, lse): float32 [B, H, n, Dv] and [B, H, n].)";

}  // namespace

void register_staircase_attention(py::module_& m) {
  const py::none none;
  m.def("staircase_attention", &attend, kDoc, py::arg("query"), py::arg("key_storage"), py::arg("value_storage"),
        py::arg("ends"), py::kw_only(), py::arg("distance_bias") = none, py::arg("sink_logits") = none,
        py::arg("key_bits"), py::arg("value_bits"), py::arg("sink_size"), py::arg("step"), py::arg("group_size") = 64,
        py::arg("grid") = "embedded", py::arg("schedule") = "causal", py::arg("schedule_args") = py::list(),
        py::arg("scale") = none, py::arg("softcap") = 0.0, py::arg("out") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
