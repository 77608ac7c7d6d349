// SPDX-License-Identifier: Apache-2.0
// pycore.native.attention and attention_backward: the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pycore/dtype.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../host/attention_append_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

// The keyword arguments of a call, taken out one by one: the two functions share most of theirs.
class Keywords {
 public:
  Keywords(const char* op, py::kwargs keywords) : op_(op), left_(std::move(keywords)) {}

  py::object object(const char* name) {
    if (!left_.contains(name)) return py::none();
    const py::object given = left_[name];
    left_.attr("pop")(name);
    return given;
  }
  std::optional<int64_t> integer(const char* name) { return optional_integer(object(name), op_, name); }
  template <class T>
  std::optional<T> number(const char* name) {
    const py::object given = object(name);
    if (given.is_none()) return std::nullopt;
    try {
      return given.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(op_) + ": " + name + " is a " +
                           py::str(py::type::of(given).attr("__name__")).cast<std::string>() + ", which it cannot be");
    }
  }
  // Whatever is left has a name that the function does not know.
  void finish() const {
    for (const auto& item : left_) {
      throw py::type_error(std::string(op_) + ": there is no argument '" + py::str(item.first).cast<std::string>() +
                           "'");
    }
  }

 private:
  const char* op_;
  py::dict left_;
};

// The arguments both functions share; the arrays keep the memory alive.
struct Inputs {
  std::vector<Array> arrays;
  std::vector<const char*> names;  // of the arrays
  AttentionArgs args;
  py::object threads;
  int64_t stream = 0;

  Inputs(const char* op, const py::object& query, const py::object& key, const py::object& value, Keywords& keywords) {
    args.op = op;
    threads = keywords.object("threads");
    stream = keywords.integer("stream").value_or(0);
    const auto take = [&](Array array, const char* name) {
      arrays.push_back(std::move(array));
      names.push_back(name);
      return arrays.back().view;
    };
    args.query = take(input(query, op, "query", stream), "query");
    args.key = take(input(key, op, "key", stream), "key");
    args.value = take(input(value, op, "value", stream), "value");
    args.schedule = keywords.number<std::string>("schedule").value_or("causal");
    const bool positions = args.schedule == "prefix" || args.schedule == "segments";  // else words of bits
    const std::pair<const char*, TensorView*> optional[] = {
        {"rope_cos", &args.rope_cos},           {"rope_sin", &args.rope_sin},
        {"distance_bias", &args.distance_bias}, {"alibi_slopes", &args.alibi_slopes},
        {"sink_logits", &args.sink_logits},     {"key_starts", &args.key_starts},
        {"key_lengths", &args.key_lengths},     {"key_offset", &args.key_offset},
        {"query_lengths", &args.query_lengths}, {"schedule_tensor", &args.schedule_tensor},
        {"dropout_seed", &args.dropout_seed},   {"block_bias", &args.block_bias}};
    for (const auto& [name, target] : optional) {
      const bool widen = target != &args.schedule_tensor || positions;
      *target = take(small_input(keywords.object(name), op, name, stream, widen), name);
    }
    const py::object numbers = keywords.object("schedule_args");
    if (!numbers.is_none()) args.schedule_args = integers(numbers, op, "schedule_args");
    args.interleaved = keywords.number<bool>("interleaved").value_or(false);
    const std::optional<int64_t> limit = keywords.integer("distance_limit");
    check_value(!limit || *limit >= 0, op, "distance_limit is ", limit.value_or(0), " and must be at least 0");
    args.distance_limit = limit.value_or(-1);
    args.key_ring = keywords.integer("key_ring").value_or(0);
    args.key_layout = keywords.number<std::string>("key_layout").value_or("rows");
    const int64_t head_dim = args.query.dims == 4 ? args.query.shape[3] : 1;
    const double usual = head_dim > 0 ? std::pow(static_cast<double>(head_dim), -0.5) : 1.0;
    args.scale = keywords.number<double>("scale").value_or(usual);
    args.softcap = keywords.number<double>("softcap").value_or(0.0);
    args.dropout_p = keywords.number<double>("dropout_p").value_or(0.0);
    args.symmetric_bias = keywords.number<bool>("symmetric_bias").value_or(false);
  }

  // No result may lie in the memory of an argument or of another result.
  void check_results(const std::vector<NamedView>& results, const std::vector<NamedView>& more = {}) const {
    std::vector<NamedView> read = more;
    for (size_t i = 0; i < arrays.size(); ++i) read.push_back({names[i], arrays[i].view});
    check_disjoint(args.op, results, read);
  }
};

DType sum_dtype(const AttentionParams& params) {
  return params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

py::tuple attention(py::object query, py::object key, py::object value, py::kwargs keyword_arguments) {
  constexpr const char* kOp = "attention";
  const FixedFloats fixed;  // for the default scale, the checks and the launches
  Keywords keywords(kOp, std::move(keyword_arguments));
  const Inputs inputs(kOp, query, key, value, keywords);
  const py::object out = keywords.object("out"), lse = keywords.object("lse"), lse_low = keywords.object("lse_low");
  keywords.finish();
  AttentionParams params = attention_params(inputs.args);
  const Device device = inputs.args.query.device;
  const Array out_array =
      contiguous_result(out, params.dtype, {params.batch, params.heads, params.query_length, params.value_dim}, device,
                        kOp, "out", inputs.stream);
  const Array lse_array = contiguous_result(lse, sum_dtype(params), {params.batch, params.heads, params.query_length},
                                            device, kOp, "lse", inputs.stream);
  Array low_array;
  if (!lse_low.is_none()) {
    low_array = contiguous_result(lse_low, sum_dtype(params), {params.batch, params.heads, params.query_length}, device,
                                  kOp, "lse_low", inputs.stream);
    params.lse_low = low_array.view.data;
  }
  std::vector<NamedView> results = {{"out", out_array.view}, {"lse", lse_array.view}};
  if (params.lse_low) results.push_back({"lse_low", low_array.view});
  inputs.check_results(results);
  params.out = out_array.view.data;
  params.lse = lse_array.view.data;
  const Parallel parallel = thread_parallel(inputs.threads, kOp);
  {
    const py::gil_scoped_release release;
    if (device == Device::kCuda) {
      throw_if(launch_attention_forward(params, nullptr, reinterpret_cast<void*>(inputs.stream)), kOp);
    } else {
      const AlignedScratch scratch(kOp, attention_forward_scratch(params, parallel.threads));
      throw_if(attention_forward(params, parallel, scratch.data), kOp);
    }
  }
  return py::make_tuple(out_array.object, lse_array.object);
}

py::tuple attention_append(py::object query, py::object key, py::object value, py::object key_cache,
                           py::object value_cache, py::object lengths, py::kwargs keyword_arguments) {
  constexpr const char* kOp = "attention_append";
  const FixedFloats fixed;  // as in attention
  Keywords keywords(kOp, std::move(keyword_arguments));
  const Array written[] = {output(key_cache, kOp, "key_cache"), output(value_cache, kOp, "value_cache"),
                           output(lengths, kOp, "lengths")};
  const Array read[] = {input(key, kOp, "key"), input(value, kOp, "value"),
                        optional_input(keywords.object("starts"), kOp, "starts")};
  CacheAppendArgs appended;
  appended.op = kOp;
  appended.key_cache = written[0].view;
  appended.value_cache = written[1].view;
  appended.lengths = written[2].view;
  appended.key = read[0].view;
  appended.value = read[1].view;
  appended.starts = read[2].view;
  appended.sink_size = keywords.integer("sink_size").value_or(0);
  appended.most = keywords.integer("most").value_or(-1);
  Inputs inputs(kOp, query, key_cache, value_cache, keywords);
  inputs.names[1] = "key_cache";
  inputs.names[2] = "value_cache";
  for (const TensorView* given : {&inputs.args.key_starts, &inputs.args.key_lengths, &inputs.args.key_offset}) {
    check_value(!given->defined(), kOp,
                "the cache says where keys are: key_starts, key_lengths and key_offset must be None");
  }
  const py::object out = keywords.object("out"), lse = keywords.object("lse");
  keywords.finish();
  AppendAndAttend all = append_and_attend_params(appended, &inputs.args);
  AttentionParams& params = all.attend;
  const Array out_array =
      cpu_result(out, params.dtype, {params.batch, params.heads, params.query_length, params.value_dim}, kOp, "out");
  const Array lse_array =
      cpu_result(lse, sum_dtype(params), {params.batch, params.heads, params.query_length}, kOp, "lse");
  inputs.check_results({{"out", out_array.view}, {"lse", lse_array.view}},
                       {{"key", appended.key}, {"value", appended.value}, {"lengths", appended.lengths}});
  params.out = out_array.view.data;
  params.lse = lse_array.view.data;
  const Parallel parallel = thread_parallel(inputs.threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, attention_forward_scratch(params, parallel.threads));
    throw_if(lambda_cache_append(all.append, parallel), kOp);
    throw_if(attention_forward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(out_array.object, lse_array.object);
}

py::tuple attention_backward(py::object grad_out, py::object grad_lse, py::object out, py::object lse, py::object query,
                             py::object key, py::object value, py::kwargs keyword_arguments) {
  constexpr const char* kOp = "attention_backward";
  const FixedFloats fixed;  // as in attention
  Keywords keywords(kOp, std::move(keyword_arguments));
  const Inputs inputs(kOp, query, key, value, keywords);
  check_value(inputs.args.query.device == Device::kCpu, kOp,
              "query is on a CUDA device and the backward pass runs on the CPU");
  check_value(inputs.args.key_layout == "rows", kOp, "key_layout is \"", inputs.args.key_layout,
              "\" and must be \"rows\": gradients are of keys in rows");
  const Array grad_out_array = input(grad_out, kOp, "grad_out"), out_array = input(out, kOp, "out");
  const Array lse_array = input(lse, kOp, "lse"), grad_lse_array = optional_input(grad_lse, kOp, "grad_lse");
  const Array low_array = optional_input(keywords.object("lse_low"), kOp, "lse_low");
  AttentionBackwardParams params = attention_backward_params(inputs.args, grad_out_array.view, grad_lse_array.view,
                                                             out_array.view, lse_array.view, low_array.view);
  const AttentionParams& shape = params.forward;
  std::vector<Array> gradients;
  std::vector<const char*> names;
  const auto gradient = [&](const char* name, const std::vector<int64_t>& sizes) {
    names.push_back(name);
    gradients.push_back(cpu_result(keywords.object(name), sum_dtype(shape), sizes, kOp, name));
    return gradients.back().view.data;
  };
  params.grad_query = gradient("grad_query", {shape.batch, shape.heads, shape.query_length, shape.head_dim});
  params.grad_key = gradient("grad_key", {shape.batch, shape.kv_heads, shape.key_length, shape.head_dim});
  params.grad_value = gradient("grad_value", {shape.batch, shape.kv_heads, shape.key_length, shape.value_dim});
  const size_t always = gradients.size();
  if (shape.distance_bias) params.grad_bias = gradient("grad_bias", {shape.heads, shape.bias_length});
  const size_t with_bias = gradients.size();
  if (shape.sink_logits) params.grad_sink_logits = gradient("grad_sink_logits", {shape.heads});
  const size_t usual = gradients.size();
  // Where they are given alone: each is a pass of its own.
  if (const py::object given = keywords.object("grad_alibi_slopes"); !given.is_none()) {
    const TensorView& slopes = inputs.args.alibi_slopes;
    check_value(slopes.defined(), kOp, "grad_alibi_slopes is given and must be None, for want of alibi_slopes");
    params.slope_rows = slopes.dims == 2 ? slopes.shape[0] : 1;
    names.push_back("grad_alibi_slopes");
    gradients.push_back(
        cpu_result(given, sum_dtype(shape), {slopes.shape, slopes.shape + slopes.dims}, kOp, names.back()));
    params.grad_slopes = gradients.back().view.data;
  }
  if (const py::object given = keywords.object("grad_numbers"); !given.is_none()) {
    names.push_back("grad_numbers");
    gradients.push_back(cpu_result(given, DType::kFloat64, {2}, kOp, names.back()));
    params.grad_numbers = static_cast<double*>(gradients.back().view.data);
  }
  keywords.finish();
  std::vector<NamedView> results;
  for (size_t i = 0; i < gradients.size(); ++i) results.push_back({names[i], gradients[i].view});
  inputs.check_results(results, {{"grad_out", grad_out_array.view},
                                 {"grad_lse", grad_lse_array.view},
                                 {"out", out_array.view},
                                 {"lse", lse_array.view},
                                 {"lse_low", low_array.view}});
  const Parallel parallel = thread_parallel(inputs.threads, kOp);
  {
    const py::gil_scoped_release release;
    const int64_t rows = shape.batch * shape.heads * shape.query_length;
    const AlignedScratch delta(kOp, size_product({rows, dtype_size(sum_dtype(shape))}), "delta");
    params.delta = delta.data;
    const AlignedScratch scratch(kOp, attention_backward_scratch(params, parallel.threads));
    throw_if(attention_backward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(gradients[0].object, gradients[1].object, gradients[2].object,
                        with_bias > always ? gradients[always].object : py::none(),
                        usual > with_bias ? gradients[with_bias].object : py::none());
}

constexpr const char* kAttentionDoc =
    R"(softmax(scale * query key^T, over the keys the schedule keeps) value, for NumPy arrays and DLPack tensors.

query [B, H, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]: float32, float16, bfloat16 or float64 on the CPU, float32
on CUDA; last dimension contiguous. Keywords: schedule ("full", "causal", "lambda" with schedule_args = [sink_size,
window_size] or [sink_size, window_size, right], "prefix" with schedule_tensor = lengths [B], "segments" with schedule_args =
[causal] or [causal, window_size, sink_size, right] and schedule_tensor = boundaries [S + 1] or [B, S + 1], "blocks" with schedule_args = [block_size, sink_size, window_blocks] and, from `attention_blocks`, schedule_tensor =
blocks and block_bias = correction, "key_subset" with schedule_args = [causal] and schedule_tensor = words [1 or B, words], a bit
for every position, "tree" with schedule_tensor = nodes [1 or B, T, 2 + words]: parent, depth, and a bit for every ancestor and
the node itself, and schedule_args = [] or [sink_size, window_size]), rope_cos and rope_sin [n, R/2], distance_bias,
alibi_slopes, symmetric_bias, sink_logits, softcap, dropout_p with dropout_seed,
key_starts, key_lengths, key_offset, query_lengths, interleaved, scale: as in pycore.ops.attention, except that
distance_limit defaults to none for every schedule, and
key_ring > 0 says that the last key_ring key rows are a ring (position j in row j % key_ring) and the others sinks.
key_layout "tiles" says that key lies by channel within tiles of 64 rows, [B, Hkv, ceil(Lk / 64), D, 64] (on the CPU, without
key_starts and key_offset, and in the forward pass). out and
lse are new arrays unless given; what rounding lse left out, which gradients need where |lse| is large, goes to lse_low
[B, H, Lq] if that is given. threads defaults to all processors, and more than 256 and than there are count as that many;
stream is a CUDA stream's address. Returns (out [B, H, Lq, Dv], lse [B, H, Lq]). Raises ValueError or TypeError
in one sentence.)";

constexpr const char* kAppendDoc =
    R"(`lambda_cache_append`, then `attention` of the tokens' queries over the cache, in one call. CPU.

query [B, H, n, D], a row for each token; key, value, key_cache, value_cache and lengths, and the keywords starts, sink_size (0 by
default) and most, as in `lambda_cache_append`; the other keywords as in `attention`, but for key_starts, key_lengths and
key_offset. Returns (out, lse). What either refuses is refused before anything is written.)";

constexpr const char* kBackwardDoc =
    R"(Gradients of `attention`: (grad_query, grad_key, grad_value, grad_bias, grad_sink_logits), new arrays unless given. CPU.

grad_out is like out; grad_lse [B, H, Lq] or None; out and lse are what `attention` returned for the same arguments, and lse_low
what it left there, without which the scores are computed once more, where lse is that of these keys alone. Gradients
are float32 (float64 for float64); those of distance_bias and sink_logits are None where there is none of these.
grad_alibi_slopes, of the shape of alibi_slopes, and grad_numbers, float64 [2], of scale and softcap, are written where
they are given.)";

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention", &attention, kAttentionDoc, py::arg("query"), py::arg("key"), py::arg("value"));
  m.def("attention_append", &attention_append, kAppendDoc, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("key_cache"), py::arg("value_cache"), py::arg("lengths"));
  m.def("attention_backward", &attention_backward, kBackwardDoc, py::arg("grad_out"), py::arg("grad_lse"),
        py::arg("out"), py::arg("lse"), py::arg("query"), py::arg("key"), py::arg("value"));
}

}  // namespace pycore::python
