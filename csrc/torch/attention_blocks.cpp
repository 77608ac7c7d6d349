// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.attention_blocks: schema, validation, allocation, registration.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/attention_blocks_args.h"
#include "stream.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A family's probabilities on `like`'s device, computed on the host, so that they are the CPU's, and copied there at
// first use: a later call, in a graph's capture too, only reads them. The tables are few and stay; the destructor of a
// static one would run when torch is gone.
Tensor device_family(const Tensor& like, int32_t device, BlockFamily family, double parameter, int64_t count) {
  int64_t entries = 1024;
  while (entries < count) entries *= 2;
  using Key = std::tuple<int32_t, BlockFamily, double, int64_t>;
  static std::mutex mutex;
  static auto* const tables = new std::map<Key, Tensor>();
  const Key key(device, family, parameter, entries);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = tables->find(key);
  if (found != tables->end()) return found->second;
  Tensor host = torch::stable::empty({entries}, ScalarType::Double);
  block_family(family, parameter, entries, static_cast<double*>(host.data_ptr()));
  Tensor table = torch::stable::new_empty(like, {entries}, ScalarType::Double);
  torch::stable::copy_(table, host);
  tables->emplace(key, table);
  return table;
}

std::tuple<Tensor, Tensor> draw(Tensor seed, Tensor round, OptionalTensor probabilities, OptionalTensor key_starts,
                                OptionalTensor key_lengths, OptionalTensor key_offset, OptionalTensor query_lengths,
                                Text op, Text family_name, double parameter, Text pattern, Text correction,
                                int64_t batch, int64_t heads, int64_t query_length, int64_t key_length,
                                int64_t block_size, int64_t sink_size, int64_t window_blocks, int64_t blocks_per_row,
                                bool wide, OptionalTensor numbers) {
  const FixedFloats fixed;  // for the launches
  const char* name = op.c_str();
  probabilities = last_contiguous(probabilities, op, "distance_probs");
  for (OptionalTensor* x : {&key_starts, &key_lengths, &key_offset, &query_lengths}) {
    if (*x) *x = dense(**x, op, "a list of lengths");
  }
  if (const double* given = graph_numbers(numbers, 1, name, "numbers")) parameter = given[0];
  BlocksArgs args;
  args.op = op;
  args.seed = view(seed, name, "seed");
  args.round = view(round, name, "round");
  args.probabilities = view(probabilities, name, "distance_probs");
  args.key_starts = view(key_starts, name, "key_starts");
  args.key_lengths = view(key_lengths, name, "key_lengths");
  args.key_offset = view(key_offset, name, "key_offset");
  args.query_lengths = view(query_lengths, name, "query_lengths");
  args.family = family_name;
  args.parameter = parameter;
  args.pattern = pattern;
  args.correction = correction;
  args.batch = batch;
  args.heads = heads;
  args.query_length = query_length;
  args.key_length = key_length;
  args.block_size = block_size;
  args.sink_size = sink_size;
  args.window_blocks = window_blocks;
  args.blocks_per_row = blocks_per_row;
  args.wide = wide;
  BlockParams params = block_params(args);
  const auto empty = [&](const char* what, std::initializer_list<int64_t> sizes, ScalarType type) {
    return new_tensor(op, what, seed, std::vector<int64_t>(sizes), type);
  };
  const TileSchedule& shape = params.rows.schedule;
  Tensor blocks = empty("the bitmap of blocks", {batch, heads, shape.block_rows, shape.block_words}, ScalarType::Long);
  Tensor added = empty("correction", {params.correction_rows, params.probability_length},
                       wide ? ScalarType::Double : ScalarType::Float);
  params.blocks = static_cast<uint64_t*>(blocks.data_ptr());
  params.correction = added.data_ptr();
  if (args.seed.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.seed.device_index);
    std::optional<Tensor> table;
    if (params.family != BlockFamily::kTable) {
      table = device_family(seed, args.seed.device_index, params.family, parameter, params.probability_length);
      params.probabilities = static_cast<const double*>(table->data_ptr());
    }
    void* stream = current_cuda_stream(args.seed.device_index, name);
    throw_if(launch_attention_blocks(params, stream), name);
    if (!wide) throw_if(launch_block_correction(params, stream), name);  // float64 is a dtype of the CPU's kernels
    return {blocks, added};
  }
  const Parallel parallel = torch_parallel();
  const Tensor scratch = empty("scratch", {attention_blocks_scratch(params, parallel.threads)}, ScalarType::Byte);
  throw_if(attention_blocks(params, parallel, scratch.data_ptr()), name);
  return {blocks, added};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "attention_blocks(Tensor seed, Tensor round, Tensor? distance_probs, Tensor? key_starts, Tensor? key_lengths, "
      "Tensor? key_offset, Tensor? query_lengths, str op, str family, float parameter, str pattern, str correction, "
      "SymInt batch, SymInt heads, SymInt query_length, SymInt key_length, SymInt block_size, SymInt sink_size, "
      "SymInt window_blocks, SymInt blocks_per_row, bool wide, Tensor? numbers=None) -> (Tensor blocks, Tensor "
      "correction)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) { m.impl("attention_blocks", TORCH_BOX(&pycore::draw)); }
STABLE_TORCH_LIBRARY_IMPL(pycore, CUDA, m) { m.impl("attention_blocks", TORCH_BOX(&pycore::draw)); }
