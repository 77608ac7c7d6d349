// SPDX-License-Identifier: Apache-2.0
// pycore.native.{quantize_cdf, ac_encode, ac_decode, ac_encode_logits, ac_decode_logits, torchac_encode,
// torchac_decode}: the coder for NumPy arrays
// and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <deque>
#include <optional>
#include <vector>

#include "../host/arithmetic_coding_args.h"
#include "../host/arithmetic_coding_steps.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

py::object quantize(py::object values, bool logits, py::object precision, py::object out, py::object threads) {
  constexpr const char* kOp = "quantize_cdf";
  const char* argument = logits ? "logits" : "probs";
  const Array array = input(values, kOp, argument);
  QuantizeParams params = quantize_params(kOp, array.view, logits, optional_integer(precision, kOp, "precision"));
  std::vector<int64_t> shape(array.view.shape, array.view.shape + array.view.dims);
  shape.back() += 1;
  const Array cdf = cpu_result(out, DType::kInt32, shape, kOp, "out");
  check_disjoint(kOp, {{"out", cdf.view}}, {{argument, array.view}});
  const Parallel parallel = thread_parallel(threads, kOp);
  const Deferred rows(kOp, out, cdf.view);
  int64_t fault = kNoFault;
  params.cdf = rows.as<int32_t>();
  params.fault = &fault;
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, quantize_cdf_scratch(params, parallel.threads));
    throw_if(quantize_cdf(params, parallel, scratch.data), kOp);
  }
  check_quantized(kOp, params);
  rows.finish();
  return cdf.object;
}

// A Face of host/arithmetic_coding_steps.h. Decoding gives `out`, which must share no memory with what is read.
struct CoderFace {
  const char* op;
  Parallel parallel;
  py::object out = py::none();
  std::vector<NamedView> read = {};
  std::deque<AlignedScratch> scratch = {};
  Array offsets_array = {}, data_array = {}, symbols_array = {};
  std::optional<Deferred> result = {};

  void* memory(int64_t bytes, const char* what) { return scratch.emplace_back(op, bytes, what).data; }
  template <class Kernel>
  void run(const Kernel& kernel) const {
    const py::gil_scoped_release release;
    throw_if(kernel(), op);
  }
  int64_t* offsets(int64_t count) {
    offsets_array = cpu_result(py::none(), DType::kInt64, {count}, op, "offsets");
    return offsets_array.view.as<int64_t>();
  }
  uint8_t* data(int64_t bytes) {
    data_array = cpu_result(py::none(), DType::kUInt8, {bytes}, op, "data");
    return data_array.view.as<uint8_t>();
  }
  void* symbols(DType dtype, int64_t streams, int64_t length) {
    symbols_array = cpu_result(out, dtype, {streams, length}, op, "out");
    check_disjoint(op, std::vector<NamedView>{{"out", symbols_array.view}}, read);
    return result.emplace(op, out, symbols_array.view).as<void>();
  }
};

py::tuple encoded(const char* op, const EncodeParams& params, const char* argument, const py::object& threads) {
  CoderFace face = {op, thread_parallel(threads, op)};
  encode_streams(face, params, argument);
  return py::make_tuple(face.data_array.object, face.offsets_array.object);
}

py::tuple encode_with(const char* op, const py::object& symbols, const char* argument, const py::object& model,
                      const std::optional<int64_t>* precision, const py::object& model_id, int64_t lanes,
                      const py::object& threads) {
  const Array symbols_array = input(symbols, op, "symbols"), model_array = input(model, op, argument);
  return encoded(op,
                 encode_params(op, symbols_array.view, argument, model_array.view, precision,
                               optional_integer(model_id, op, "model_id"), lanes),
                 argument, threads);
}

template <class ModelOf>
py::object decoded(const char* op, const py::object& data, const py::object& offsets, const char* argument,
                   const NamedView& model, bool adaptive, const py::object& out, const py::object& threads,
                   const ModelOf& model_of) {
  const Array data_array = input(data, op, "data"), offsets_array = input(offsets, op, "offsets");
  CoderFace face = {
      op, thread_parallel(threads, op), out, {{"data", data_array.view}, {"offsets", offsets_array.view}, model}};
  decode_streams(face, data_array.view, offsets_array.view, argument, adaptive, model_of);
  face.result->finish();
  return face.symbols_array.object;
}

py::object decode_with(const char* op, const py::object& data, const py::object& offsets, const char* argument,
                       const py::object& model, const std::optional<int64_t>* precision, const py::object& model_id,
                       const py::object& out, const py::object& threads) {
  const Array model_array = input(model, op, argument);
  const std::optional<int64_t> id = optional_integer(model_id, op, "model_id");
  return decoded(
      op, data, offsets, argument, {argument, model_array.view}, false, out, threads, [&](DecodeParams* params) {
        params->model = coder_model(op, argument, model_array.view, precision, params->streams, params->length, id);
      });
}

py::tuple ac_encode(py::object symbols, py::object cdf, py::object model_id, py::object lanes, py::object threads) {
  constexpr const char* kOp = "ac_encode";
  return encode_with(kOp, symbols, "cdf", cdf, nullptr, model_id, integer(lanes, kOp, "lanes"), threads);
}

py::object ac_decode(py::object data, py::object offsets, py::object cdf, py::object model_id, py::object out,
                     py::object threads) {
  return decode_with("ac_decode", data, offsets, "cdf", cdf, nullptr, model_id, out, threads);
}

py::tuple ac_encode_logits(py::object symbols, py::object logits, py::object precision, py::object model_id,
                           py::object threads) {
  constexpr const char* kOp = "ac_encode_logits";
  const std::optional<int64_t> bits = optional_integer(precision, kOp, "precision");
  return encode_with(kOp, symbols, "logits", logits, &bits, model_id, 1, threads);
}

py::object ac_decode_logits(py::object data, py::object offsets, py::object logits, py::object precision,
                            py::object model_id, py::object out, py::object threads) {
  constexpr const char* kOp = "ac_decode_logits";
  const std::optional<int64_t> bits = optional_integer(precision, kOp, "precision");
  return decode_with(kOp, data, offsets, "logits", logits, &bits, model_id, out, threads);
}

py::tuple ac_encode_bytes(py::object data, py::object order, py::object threads) {
  constexpr const char* kOp = "ac_encode_bytes";
  const Array array = input(data, kOp, "data");
  return encoded(kOp, encode_bytes_params(kOp, array.view, integer(order, kOp, "order")), "data", threads);
}

py::object ac_decode_bytes(py::object data, py::object offsets, py::object out, py::object threads) {
  const TensorView none;
  return decoded("ac_decode_bytes", data, offsets, "data", {"model", none}, true, out, threads, [](DecodeParams*) {});
}

constexpr const char* kEncodeBytesDoc =
    R"(One stream per row of bytes, with a model that learns from them: see pycore.ops.ac_encode_bytes.

data [streams, length] uint8. Returns (data, offsets) as ac_encode.)";

constexpr const char* kDecodeBytesDoc = R"(Inverse of `ac_encode_bytes`: uint8 [streams, length], in `out` if given.)";

py::object torchac_encode(py::object cdf, py::object sym) {
  constexpr const char* kOp = "torchac_encode";
  const Array cdf_array = input(cdf, kOp, "cdf"), sym_array = input(sym, kOp, "sym");
  BitwiseParams params = bitwise_params(kOp, cdf_array.view);
  check_bitwise_symbols(kOp, sym_array.view, cdf_array.view, &params);
  StreamResult result;
  params.result = &result;
  std::vector<uint8_t> memory = memory_for<uint8_t>(kOp, "room for the stream", bitwise_capacity(params));
  params.data = memory.data();
  {
    const py::gil_scoped_release release;
    throw_if(bitwise_encode(params), kOp);
  }
  check_bitwise_result(kOp, result);
  const Array data = cpu_result(py::none(), DType::kUInt8, {result.bytes}, kOp, "data");
  std::memcpy(data.view.data, memory.data(), static_cast<size_t>(result.bytes));
  return data.object;
}

py::object torchac_decode(py::object cdf, py::object byte_stream, py::object out) {
  constexpr const char* kOp = "torchac_decode";
  const Array cdf_array = input(cdf, kOp, "cdf"), data_array = input(byte_stream, kOp, "byte_stream");
  BitwiseParams params = bitwise_params(kOp, cdf_array.view);
  check_bitwise_data(kOp, data_array.view, &params);
  const TensorView& view = cdf_array.view;
  const Array sym = cpu_result(out, DType::kInt16, {view.shape, view.shape + view.dims - 1}, kOp, "out");
  check_disjoint(kOp, {{"out", sym.view}}, {{"cdf", cdf_array.view}, {"byte_stream", data_array.view}});
  const Deferred rows(kOp, out, sym.view);
  StreamResult result;
  params.out = rows.as<int16_t>();
  params.result = &result;
  {
    const py::gil_scoped_release release;
    throw_if(bitwise_decode(params), kOp);
  }
  check_bitwise_result(kOp, result);
  rows.finish();
  return sym.object;
}

constexpr const char* kTorchacEncodeDoc = R"(A stream in torchac's format: see pycore.compat.torchac.

cdf [..., V + 1], int16 with the bits of uint16, or uint16; sym [...], any integer dtype. Returns uint8 [bytes].)";

constexpr const char* kTorchacDecodeDoc = R"(Inverse of `torchac_encode`: int16 [...], in `out` if given.)";

constexpr const char* kQuantizeDoc =
    R"(Integer cumulative frequencies of probabilities or logits: see pycore.ops.quantize_cdf.

values [..., V]: float32, float64, float16 or bfloat16. Returns int32 [..., V + 1], in `out` if given.
precision None: enough for V symbols.)";

constexpr const char* kEncodeDoc = R"(One stream per row of symbols: see pycore.ops.ac_encode.

symbols [streams, length]: any integer dtype. cdf broadcasts to [streams, length, V + 1], int32 or uint16. Returns
(data, offsets): uint8 [bytes] and int64 [streams + 1], stream i being data[offsets[i]:offsets[i + 1]].)";

constexpr const char* kDecodeDoc = R"(Inverse of `ac_encode`: int64 [streams, length], in `out` if given.

BitstreamError where a stream is damaged or was coded with another model.)";

constexpr const char* kEncodeLogitsDoc =
    R"(The bytes of ac_encode(symbols, quantize_cdf(logits, logits=True, precision=precision)), without storing the cdf.

logits broadcasts to [streams, length, V].)";

constexpr const char* kDecodeLogitsDoc =
    R"(Inverse of `ac_encode_logits`: int64 [streams, length], in `out` if given.)";

}  // namespace

void register_arithmetic_coding(py::module_& m) {
  const py::none none;
  py::register_exception<BitstreamError>(m, "BitstreamError", PyExc_ValueError);
  m.attr("BitstreamError").attr("__doc__") =
      "A stream is truncated, damaged, extended, foreign, or was coded with another model.";
  m.def("quantize_cdf", &quantize, kQuantizeDoc, py::arg("values"), py::kw_only(), py::arg("logits") = false,
        py::arg("precision") = 16, py::arg("out") = none, py::arg("threads") = none);
  m.def("ac_encode", &ac_encode, kEncodeDoc, py::arg("symbols"), py::arg("cdf"), py::kw_only(),
        py::arg("model_id") = none, py::arg("lanes") = 1, py::arg("threads") = none);
  m.def("ac_decode", &ac_decode, kDecodeDoc, py::arg("data"), py::arg("offsets"), py::arg("cdf"), py::kw_only(),
        py::arg("model_id") = none, py::arg("out") = none, py::arg("threads") = none);
  m.def("ac_encode_logits", &ac_encode_logits, kEncodeLogitsDoc, py::arg("symbols"), py::arg("logits"), py::kw_only(),
        py::arg("precision") = 16, py::arg("model_id") = none, py::arg("threads") = none);
  m.def("ac_decode_logits", &ac_decode_logits, kDecodeLogitsDoc, py::arg("data"), py::arg("offsets"), py::arg("logits"),
        py::kw_only(), py::arg("precision") = 16, py::arg("model_id") = none, py::arg("out") = none,
        py::arg("threads") = none);
  m.def("ac_encode_bytes", &ac_encode_bytes, kEncodeBytesDoc, py::arg("data"), py::kw_only(), py::arg("order") = 0,
        py::arg("threads") = none);
  m.def("ac_decode_bytes", &ac_decode_bytes, kDecodeBytesDoc, py::arg("data"), py::arg("offsets"), py::kw_only(),
        py::arg("out") = none, py::arg("threads") = none);
  m.def("torchac_encode", &torchac_encode, kTorchacEncodeDoc, py::arg("cdf"), py::arg("sym"));
  m.def("torchac_decode", &torchac_decode, kTorchacDecodeDoc, py::arg("cdf"), py::arg("byte_stream"), py::kw_only(),
        py::arg("out") = none);
}

}  // namespace pycore::python
