// SPDX-License-Identifier: Apache-2.0
// pycore.native.attention_blocks, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../host/attention_blocks_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

py::tuple draw(py::object seed, py::object round, py::object batch, py::object heads, py::object query_length,
               py::object key_length, py::object block_size, py::object distance_probs, std::string family_name,
               double parameter, std::string pattern, std::string correction, py::object sink_size,
               py::object window_blocks, py::object blocks_per_row, py::object key_starts, py::object key_lengths,
               py::object key_offset, py::object query_lengths, bool wide, py::object threads) {
  constexpr const char* kOp = "attention_blocks";
  const FixedFloats fixed;
  const Array read[] = {input(seed, kOp, "seed"),
                        input(round, kOp, "round"),
                        optional_input(distance_probs, kOp, "distance_probs"),
                        small_input(key_starts, kOp, "key_starts", 0, true),
                        small_input(key_lengths, kOp, "key_lengths", 0, true),
                        small_input(key_offset, kOp, "key_offset", 0, true),
                        small_input(query_lengths, kOp, "query_lengths", 0, true)};
  BlocksArgs args;
  args.op = kOp;
  args.seed = read[0].view;
  args.round = read[1].view;
  args.probabilities = read[2].view;
  args.key_starts = read[3].view;
  args.key_lengths = read[4].view;
  args.key_offset = read[5].view;
  args.query_lengths = read[6].view;
  args.family = family_name;
  args.parameter = parameter;
  args.pattern = pattern;
  args.correction = correction;
  args.batch = integer(batch, kOp, "batch");
  args.heads = integer(heads, kOp, "heads");
  args.query_length = integer(query_length, kOp, "query_length");
  args.key_length = integer(key_length, kOp, "key_length");
  args.block_size = integer(block_size, kOp, "block_size");
  args.sink_size = integer(sink_size, kOp, "sink_size");
  args.window_blocks = integer(window_blocks, kOp, "window_blocks");
  const std::optional<int64_t> chosen = optional_integer(blocks_per_row, kOp, "blocks_per_row");
  check_value(chosen.value_or(1) >= 1, kOp, "blocks_per_row is ", chosen.value_or(1), " and must be at least 1");
  args.blocks_per_row = chosen.value_or(-1);
  args.wide = wide;
  BlockParams params = block_params(args);
  const TileSchedule& shape = params.rows.schedule;
  const Array blocks = cpu_result(py::none(), DType::kInt64,
                                  {args.batch, args.heads, shape.block_rows, shape.block_words}, kOp, "blocks");
  const Array added = cpu_result(py::none(), params.correction_dtype,
                                 {params.correction_rows, params.probability_length}, kOp, "correction");
  params.blocks = blocks.view.as<uint64_t>();
  params.correction = added.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, attention_blocks_scratch(params, parallel.threads));
    throw_if(attention_blocks(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(blocks.object, added.object);
}

constexpr const char* kDoc = R"(Draws the blocks of one round of probabilistic attention.

seed int64 [batch] or one number, round one int64 number; distance_probs float64 [n] or [heads, n], or a family ("geometric",
"power_law", "harmonic", "gaussian", "constant") and its parameter; the other arguments as in pycore.ops.pr_flash_attention.
Returns (blocks, correction): a bitmap int64 [batch, heads, query blocks, words of 64 key blocks] and, for correction =
"importance", -log p by block distance, float32 (float64 if wide) [1 or heads, n], else of no rows. They are what `attention`
takes with schedule="blocks" and the same lengths. Raises ValueError or TypeError in one sentence.)";

}  // namespace

void register_attention_blocks(py::module_& m) {
  m.def("attention_blocks", &draw, kDoc, py::kw_only(), py::arg("seed"), py::arg("round"), py::arg("batch"),
        py::arg("heads"), py::arg("query_length"), py::arg("key_length"), py::arg("block_size") = 64,
        py::arg("distance_probs") = py::none(), py::arg("family") = "table", py::arg("parameter") = 0.0,
        py::arg("pattern") = "independent", py::arg("correction") = "none", py::arg("sink_size") = 0,
        py::arg("window_blocks") = 1, py::arg("blocks_per_row") = py::none(), py::arg("key_starts") = py::none(),
        py::arg("key_lengths") = py::none(), py::arg("key_offset") = py::none(), py::arg("query_lengths") = py::none(),
        py::arg("wide") = false, py::arg("threads") = py::none());
}

}  // namespace pycore::python
