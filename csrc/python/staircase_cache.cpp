// SPDX-License-Identifier: Apache-2.0
// pycore.native.{staircase_cache_append, staircase_cache_read}, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../host/staircase_cache_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "numbers.h"
#include "staircase_storage.h"
#include "threads.h"

namespace pycore::python {
namespace {

void append(py::sequence key_storage, py::sequence value_storage, py::object lengths, py::object key, py::object value,
            py::object starts, py::object key_bits, py::object value_bits, py::object sink_size, py::object step,
            py::object group_size, const std::string& grid, py::object threads) {
  constexpr const char* kOp = "staircase_cache_append";
  const StaircaseStorage keys(key_storage, true, kOp, "key_storage"), values(value_storage, true, kOp, "value_storage");
  const Array written = output(lengths, kOp, "lengths");
  const Array read[] = {input(key, kOp, "key"), input(value, kOp, "value"), optional_input(starts, kOp, "starts")};
  StaircaseAppendArgs args;
  args.key_storage = keys.views.data();
  args.value_storage = values.views.data();
  args.lengths = written.view;
  args.key = read[0].view;
  args.value = read[1].view;
  args.starts = read[2].view;
  args.ladder = {integers(key_bits, kOp, "key_bits"), integer(sink_size, kOp, "sink_size"), integer(step, kOp, "step"),
                 integer(group_size, kOp, "group_size"), grid};
  args.value_bits = integers(value_bits, kOp, "value_bits");
  const StaircaseCacheParams params = staircase_append_params(args);
  const Parallel parallel = thread_parallel(threads, kOp);
  const py::gil_scoped_release release;
  const int64_t fault = staircase_cache_fault(params, parallel);
  if (fault >= 0) throw_cache_fault(args, params, fault);
  throw_if(staircase_cache_append(params, parallel), kOp);
}

py::object read(py::sequence storage, py::object positions, py::object ends, py::object bits, bool by_token,
                py::object sink_size, py::object step, py::object group_size, const std::string& grid,
                py::object tokens, bool wide, py::object out, py::object threads) {
  constexpr const char* kOp = "staircase_cache_read";
  const StaircaseStorage side(storage, false, kOp, "storage");
  const Array position_array = input(positions, kOp, "positions"), end_array = input(ends, kOp, "ends");
  StaircaseReadArgs args;
  args.storage = side.views.data();
  args.positions = position_array.view;
  args.ends = end_array.view;
  args.ladder = {integers(bits, kOp, "bits"), integer(sink_size, kOp, "sink_size"), integer(step, kOp, "step"),
                 integer(group_size, kOp, "group_size"), grid};
  args.by_token = by_token;
  args.wide = wide;
  args.tokens = integer(tokens, kOp, "tokens");
  StaircaseReadParams params = staircase_read_params(args);
  const Array result = cpu_result(out, params.out_dtype,
                                  {params.batch, params.kv_heads, params.tokens, params.side.channels}, kOp, "out");
  std::vector<NamedView> inputs = {{"positions", position_array.view}, {"ends", end_array.view}};
  for (const TensorView& view : side.views) inputs.push_back({"storage", view});
  check_disjoint(kOp, std::vector<NamedView>{{"out", result.view}}, inputs);
  params.out = result.view.as<char>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(staircase_cache_read(params, parallel), kOp);
  }
  return result.object;
}

constexpr const char* kAppendDoc =
    R"(Writes new tokens into a staircase cache, in place, and quantizes the groups they finish.

key_storage, value_storage: full, plane2, plane4, plane8, lo, hi, centers2, centers4 and centers8 of a side, as in docs/ops/staircase.md;
without elements what the ladder does not need. lengths int64 [B]: tokens seen, moved on. key [B, Hkv, n, D], value
[B, Hkv, n, Dv]; starts int64 [B]: so many tokens at the front are padding and left out.)";

constexpr const char* kReadDoc = R"(What a query at each row's position reads of a side of a staircase cache.

storage as for staircase_cache_append; positions int64 [B]; ends int64 [B], how many tokens it reads, later ones as its own;
tokens is how long the result is, which is zero past ends. wide: in float32, as the codes say, else in the cache's dtype. Returns [B, Hkv, tokens, D].)";

}  // namespace

void register_staircase_cache(py::module_& m) {
  const py::none none;
  m.def("staircase_cache_append", &append, kAppendDoc, py::arg("key_storage"), py::arg("value_storage"),
        py::arg("lengths"), py::arg("key"), py::arg("value"), py::arg("starts") = none, py::kw_only(),
        py::arg("key_bits"), py::arg("value_bits"), py::arg("sink_size"), py::arg("step"), py::arg("group_size"),
        py::arg("grid") = "embedded", py::arg("threads") = none);
  m.def("staircase_cache_read", &read, kReadDoc, py::arg("storage"), py::arg("positions"), py::arg("ends"),
        py::kw_only(), py::arg("bits"), py::arg("by_token"), py::arg("sink_size"), py::arg("step"),
        py::arg("group_size"), py::arg("grid") = "embedded", py::arg("tokens"), py::arg("wide") = false,
        py::arg("out") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
