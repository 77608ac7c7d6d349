// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{quantize_cdf, ac_encode, ac_decode, ac_encode_logits, ac_decode_logits, torchac_encode,
// torchac_decode}: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../host/arithmetic_coding_args.h"
#include "../host/arithmetic_coding_steps.h"
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

Tensor quantize_cdf_cpu(const Tensor& values, bool logits, std::optional<int64_t> precision) {
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

// A Face of host/arithmetic_coding_steps.h.
struct CoderFace {
  const char* op;
  Parallel parallel = torch_parallel();
  std::vector<Tensor> scratch;
  Tensor offsets_tensor, data_tensor, symbols_tensor;

  explicit CoderFace(const char* name) : op(name) {}
  void* memory(int64_t bytes, const char* what) {
    scratch.push_back(scratch_tensor(op, bytes, what));
    return scratch.back().mutable_data_ptr();
  }
  template <class Kernel>
  void run(const Kernel& kernel) const {
    throw_if(kernel(), op);
  }
  int64_t* offsets(int64_t count) {
    offsets_tensor = empty_cpu(op, "offsets", {count}, ScalarType::Long);
    return static_cast<int64_t*>(offsets_tensor.mutable_data_ptr());
  }
  uint8_t* data(int64_t bytes) {
    data_tensor = scratch_tensor(op, bytes, "data");
    return static_cast<uint8_t*>(data_tensor.mutable_data_ptr());
  }
  void* symbols(DType dtype, int64_t streams, int64_t length) {
    const ScalarType type = dtype == DType::kUInt8 ? ScalarType::Byte : ScalarType::Long;
    symbols_tensor = empty_cpu(op, "symbols", {streams, length}, type);
    return symbols_tensor.mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor> encoded(const char* op, const EncodeParams& params, const char* argument) {
  CoderFace face(op);
  encode_streams(face, params, argument);
  return {face.data_tensor, face.offsets_tensor};
}

std::tuple<Tensor, Tensor> encode_with(const char* op, const Tensor& symbols, const char* argument, const Tensor& model,
                                       const std::optional<int64_t>* precision, std::optional<int64_t> model_id,
                                       int64_t lanes) {
  return encoded(
      op,
      encode_params(op, view(symbols, op, "symbols"), argument, view(model, op, argument), precision, model_id, lanes),
      argument);
}

template <class ModelOf>
Tensor decoded(const char* op, const Tensor& data_any, const Tensor& offsets_any, const char* argument, bool adaptive,
               const ModelOf& model_of) {
  const Tensor data = torch::stable::contiguous(data_any), offsets = torch::stable::contiguous(offsets_any);
  CoderFace face(op);
  decode_streams(face, view(data, op, "data"), view(offsets, op, "offsets"), argument, adaptive, model_of);
  return face.symbols_tensor;
}

Tensor decode_with(const char* op, const Tensor& data, const Tensor& offsets, const char* argument, const Tensor& model,
                   const std::optional<int64_t>* precision, std::optional<int64_t> model_id) {
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

std::tuple<Tensor, Tensor> ac_encode_logits_cpu(const Tensor& symbols, const Tensor& logits,
                                                std::optional<int64_t> precision, std::optional<int64_t> model_id) {
  return encode_with("ac_encode_logits", symbols, "logits", logits, &precision, model_id, 1);
}

Tensor ac_decode_logits_cpu(const Tensor& data, const Tensor& offsets, const Tensor& logits,
                            std::optional<int64_t> precision, std::optional<int64_t> model_id) {
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
  m.def("quantize_cdf(Tensor values, bool logits, SymInt? precision) -> Tensor");
  m.def("ac_encode(Tensor symbols, Tensor cdf, SymInt? model_id, SymInt lanes) -> (Tensor data, Tensor offsets)");
  m.def("ac_decode(Tensor data, Tensor offsets, Tensor cdf, SymInt? model_id) -> Tensor");
  m.def(
      "ac_encode_logits(Tensor symbols, Tensor logits, SymInt? precision, SymInt? model_id) "
      "-> (Tensor data, Tensor offsets)");
  m.def("ac_decode_logits(Tensor data, Tensor offsets, Tensor logits, SymInt? precision, SymInt? model_id) -> Tensor");
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
