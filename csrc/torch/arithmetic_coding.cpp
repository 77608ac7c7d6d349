// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{quantize_cdf, ac_encode, ac_decode, ac_encode_logits, ac_decode_logits, torchac_encode,
// torchac_decode}: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../host/arithmetic_coding_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty_cpu(const char* op, const char* argument, const std::vector<int64_t>& shape, ScalarType dtype) {
  return allocated(op, argument, shape, [&] {
    return torch::stable::empty(shape, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  });
}

Tensor scratch_tensor(const char* op, int64_t bytes, const char* argument = "scratch") {
  return empty_cpu(op, argument, {bytes}, ScalarType::Byte);
}

Tensor quantize_cdf_cpu(const Tensor& values, bool logits, int64_t precision) {
  constexpr const char* kOp = "quantize_cdf";
  QuantizeParams params = quantize_params(kOp, view(values, kOp, logits ? "logits" : "probs"), logits, precision);
  const auto sizes = values.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() += 1;
  const Tensor cdf = empty_cpu(kOp, "cdf", shape, ScalarType::Int);
  int64_t fault = kNoFault;
  params.cdf = static_cast<int32_t*>(cdf.mutable_data_ptr());
  params.fault = &fault;
  const Parallel parallel = torch_parallel();
  const Tensor scratch = scratch_tensor(kOp, quantize_cdf_scratch(params, parallel.threads));
  throw_if(quantize_cdf(params, parallel, scratch.mutable_data_ptr()), kOp);
  check_quantized(kOp, params);
  return cdf;
}

std::tuple<Tensor, Tensor> encoded(const char* op, EncodeParams params, const char* argument) {
  auto results = memory_for<StreamResult>(op, "the results of streams", params.streams);
  params.results = results.data();
  const Parallel parallel = torch_parallel();
  const Tensor memory =
      scratch_tensor(op, size_product({params.streams, ac_encode_capacity(params)}), "room for the streams");
  params.memory = static_cast<uint8_t*>(memory.mutable_data_ptr());
  const Tensor scratch = scratch_tensor(op, ac_encode_scratch(params, parallel.threads));
  throw_if(pycore::ac_encode(params, parallel, scratch.mutable_data_ptr()), op);
  check_results(op, results, argument, params.model);
  const Tensor offsets = empty_cpu(op, "offsets", {params.streams + 1}, ScalarType::Long);
  int64_t* ends = static_cast<int64_t*>(offsets.mutable_data_ptr());
  ends[0] = 0;
  for (int64_t i = 0; i < params.streams; ++i) ends[i + 1] = ends[i] + results[static_cast<size_t>(i)].bytes;
  const Tensor data = scratch_tensor(op, ends[params.streams], "data");
  throw_if(ac_pack_streams(params, ends, static_cast<uint8_t*>(data.mutable_data_ptr()), parallel), op);
  return {data, offsets};
}

std::tuple<Tensor, Tensor> encode_with(const char* op, const Tensor& symbols, const char* argument, const Tensor& model,
                                       const int64_t* precision, std::optional<int64_t> model_id, int64_t lanes) {
  return encoded(
      op,
      encode_params(op, view(symbols, op, "symbols"), argument, view(model, op, argument), precision, model_id, lanes),
      argument);
}

// What the two kinds of decoding share. `model_of(params)` adds the model.
template <class ModelOf>
Tensor decoded(const char* op, const Tensor& data_any, const Tensor& offsets_any, const char* argument, bool adaptive,
               const ModelOf& model_of) {
  const Tensor data = torch::stable::contiguous(data_any), offsets = torch::stable::contiguous(offsets_any);
  DecodeMemory memory;
  DecodeParams params = decode_params(op, view(data, op, "data"), view(offsets, op, "offsets"), &memory);
  params.adaptive = adaptive;
  const Parallel parallel = torch_parallel();
  throw_if(ac_open_streams(params, parallel), op);
  check_results(op, memory.results, argument, params.model);
  params.length = common_length(op, memory.results);
  model_of(&params);
  const Tensor scratch = scratch_tensor(op, ac_decode_scratch(params, parallel.threads));
  throw_if(ac_check_claims(params, parallel, scratch.mutable_data_ptr()), op);
  check_results(op, memory.results, argument, params.model);
  const Tensor symbols =
      empty_cpu(op, "symbols", {params.streams, params.length}, adaptive ? ScalarType::Byte : ScalarType::Long);
  params.symbols = adaptive ? nullptr : static_cast<int64_t*>(symbols.mutable_data_ptr());
  params.bytes = adaptive ? static_cast<uint8_t*>(symbols.mutable_data_ptr()) : nullptr;
  throw_if(pycore::ac_decode(params, parallel, scratch.mutable_data_ptr()), op);
  check_results(op, memory.results, argument, params.model);
  return symbols;
}

Tensor decode_with(const char* op, const Tensor& data, const Tensor& offsets, const char* argument, const Tensor& model,
                   const int64_t* precision, std::optional<int64_t> model_id) {
  const TensorView model_view = view(model, op, argument);
  return decoded(op, data, offsets, argument, false, [&](DecodeParams* params) {
    params->model = coder_model(op, argument, model_view, precision, params->streams, params->length, model_id);
  });
}

std::tuple<Tensor, Tensor> ac_encode_cpu(const Tensor& symbols, const Tensor& cdf, std::optional<int64_t> model_id,
                                         int64_t lanes) {
  return encode_with("ac_encode", symbols, "cdf", cdf, nullptr, model_id, lanes);
}

Tensor ac_decode_cpu(const Tensor& data, const Tensor& offsets, const Tensor& cdf, std::optional<int64_t> model_id) {
  return decode_with("ac_decode", data, offsets, "cdf", cdf, nullptr, model_id);
}

std::tuple<Tensor, Tensor> ac_encode_logits_cpu(const Tensor& symbols, const Tensor& logits, int64_t precision,
                                                std::optional<int64_t> model_id) {
  return encode_with("ac_encode_logits", symbols, "logits", logits, &precision, model_id, 1);
}

Tensor ac_decode_logits_cpu(const Tensor& data, const Tensor& offsets, const Tensor& logits, int64_t precision,
                            std::optional<int64_t> model_id) {
  return decode_with("ac_decode_logits", data, offsets, "logits", logits, &precision, model_id);
}

std::tuple<Tensor, Tensor> ac_encode_bytes_cpu(const Tensor& data, int64_t order) {
  constexpr const char* kOp = "ac_encode_bytes";
  return encoded(kOp, encode_bytes_params(kOp, view(data, kOp, "data"), order), "data");
}

Tensor ac_decode_bytes_cpu(const Tensor& data, const Tensor& offsets) {
  return decoded("ac_decode_bytes", data, offsets, "data", true, [](DecodeParams*) {});
}

Tensor torchac_encode_cpu(const Tensor& cdf, const Tensor& sym) {
  constexpr const char* kOp = "torchac_encode";
  const TensorView cdf_view = view(cdf, kOp, "cdf");
  BitwiseParams params = bitwise_params(kOp, cdf_view);
  check_bitwise_symbols(kOp, view(sym, kOp, "sym"), cdf_view, &params);
  const Tensor memory = scratch_tensor(kOp, bitwise_capacity(params), "room for the stream");
  StreamResult result;
  params.data = static_cast<uint8_t*>(memory.mutable_data_ptr());
  params.result = &result;
  throw_if(bitwise_encode(params), kOp);
  check_bitwise_result(kOp, result);
  const Tensor data = scratch_tensor(kOp, result.bytes, "data");
  std::memcpy(data.mutable_data_ptr(), params.data, static_cast<size_t>(result.bytes));
  return data;
}

Tensor torchac_decode_cpu(const Tensor& cdf, const Tensor& byte_stream) {
  constexpr const char* kOp = "torchac_decode";
  BitwiseParams params = bitwise_params(kOp, view(cdf, kOp, "cdf"));
  check_bitwise_data(kOp, view(byte_stream, kOp, "byte_stream"), &params);
  const auto sizes = cdf.sizes();
  const Tensor sym = empty_cpu(kOp, "sym", {sizes.begin(), sizes.end() - 1}, ScalarType::Short);
  StreamResult result;
  params.out = static_cast<int16_t*>(sym.mutable_data_ptr());
  params.result = &result;
  throw_if(bitwise_decode(params), kOp);
  check_bitwise_result(kOp, result);
  return sym;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("quantize_cdf(Tensor values, bool logits, SymInt precision) -> Tensor");
  m.def("ac_encode(Tensor symbols, Tensor cdf, SymInt? model_id, SymInt lanes) -> (Tensor data, Tensor offsets)");
  m.def("ac_decode(Tensor data, Tensor offsets, Tensor cdf, SymInt? model_id) -> Tensor");
  m.def(
      "ac_encode_logits(Tensor symbols, Tensor logits, SymInt precision, SymInt? model_id) "
      "-> (Tensor data, Tensor offsets)");
  m.def("ac_decode_logits(Tensor data, Tensor offsets, Tensor logits, SymInt precision, SymInt? model_id) -> Tensor");
  m.def("ac_encode_bytes(Tensor data, SymInt order) -> (Tensor data, Tensor offsets)");
  m.def("ac_decode_bytes(Tensor data, Tensor offsets) -> Tensor");
  m.def("torchac_encode(Tensor cdf, Tensor sym) -> Tensor");
  m.def("torchac_decode(Tensor cdf, Tensor byte_stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("quantize_cdf", TORCH_BOX(&quantize_cdf_cpu));
  m.impl("ac_encode", TORCH_BOX(&ac_encode_cpu));
  m.impl("ac_decode", TORCH_BOX(&ac_decode_cpu));
  m.impl("ac_encode_logits", TORCH_BOX(&ac_encode_logits_cpu));
  m.impl("ac_decode_logits", TORCH_BOX(&ac_decode_logits_cpu));
  m.impl("ac_encode_bytes", TORCH_BOX(&ac_encode_bytes_cpu));
  m.impl("ac_decode_bytes", TORCH_BOX(&ac_decode_bytes_cpu));
  m.impl("torchac_encode", TORCH_BOX(&torchac_encode_cpu));
  m.impl("torchac_decode", TORCH_BOX(&torchac_decode_cpu));
}

}  // namespace pycore
