// SPDX-License-Identifier: Apache-2.0
// What the two faces refuse for the coder's ops, how they fill the parameter structs, and the sentences for what the
// kernels found in the values.
#pragma once

#include <pycore/arithmetic_coding/frame.h>
#include <pycore/dtype.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

// What is wrong with a stream, and not with the caller's other arguments: pycore.BitstreamError in Python.
struct BitstreamError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The least of 16 to 24 bits at which the share of one that every symbol gets takes 2^-14 of the whole, together, or
// less: what it costs is then below 0.0001 bits a symbol. Above 1024 symbols 24 bits are all there are.
inline int precision_for(int64_t symbols) {
  int precision = 16;
  while (precision < kMaxPrecision && symbols > int64_t{1} << (precision - 14)) ++precision;
  return precision;
}

// Nothing: the precision for so many symbols.
inline int checked_precision(const char* op, std::optional<int64_t> precision, int64_t symbols) {
  const int64_t bits = precision ? *precision : precision_for(symbols);
  check_value(bits >= 1 && bits <= kMaxPrecision, op, "precision is ", bits, " and must be 1 to ", kMaxPrecision);
  return static_cast<int>(bits);
}

inline void check_alphabet(const char* op, const char* argument, int64_t symbols, int precision) {
  check_value(symbols >= 1, op, argument, " has ", symbols, " entries in its last dimension and must have at least 1");
  check_value(symbols <= int64_t{1} << precision, op, argument, " has ", symbols, " symbols, and precision ", precision,
              " has room for ", int64_t{1} << precision);
}

// values [..., V] -> cdf [..., V + 1]; the caller adds cdf and fault.
inline QuantizeParams quantize_params(const char* op, const TensorView& values, bool logits,
                                      std::optional<int64_t> precision) {
  const char* argument = logits ? "logits" : "probs";
  check_on_cpu(op, argument, values);
  check_value(is_floating(values.dtype), op, argument, " has dtype ", dtype_name(values.dtype),
              " and must have float32, float64, float16 or bfloat16");
  check_value(values.dims >= 1, op, argument, " is a scalar and must have shape [..., symbols]");
  QuantizeParams params;
  params.dtype = values.dtype;
  params.logits = logits;
  params.symbols = values.shape[values.dims - 1];
  params.precision = checked_precision(op, precision, params.symbols);
  check_alphabet(op, argument, params.symbols, params.precision);
  params.values = row_view(values);
  params.entry_stride = values.strides[values.dims - 1];
  return params;
}

inline std::string value_fault(CoderFault fault, const char* argument) {
  const std::string name = argument;
  return fault == CoderFault::kNoMass ? name + " has no mass" : name + " has NaN, infinity or a negative probability";
}

inline void check_quantized(const char* op, const QuantizeParams& params) {
  if (*params.fault == kNoFault) return;
  const CoderFault fault = static_cast<CoderFault>(*params.fault % 16);
  const int64_t row = *params.fault / 16;
  if (params.logits) {
    check_value(fault != CoderFault::kBadValue, op, "logits has NaN or +infinity in row ", row, " and must not");
    check_value(false, op, "logits has nothing above -90852 in row ", row, " and must give some symbol mass");
  }
  check_value(fault != CoderFault::kBadValue, op, "probs has NaN, infinity or a negative entry in row ", row,
              " and must not");
  check_value(false, op, "probs sums to zero in row ", row, " and must not");
}

// A dimension of the model that is 1 serves all; otherwise it must be `wanted`.
inline int64_t broadcast_stride(const char* op, const char* argument, const TensorView& model, int dim, int64_t wanted,
                                const char* of) {
  if (dim < 0) return 0;
  check_value(model.shape[dim] == wanted || model.shape[dim] == 1, op, argument, " has shape ", shape_text(model),
              ", which does not broadcast to the ", wanted, " ", of);
  return model.shape[dim] == 1 ? 0 : model.strides[dim];
}

// precision: of logits; null where the model holds cumulative frequencies, whose last entry says it.
inline CoderModel coder_model(const char* op, const char* argument, const TensorView& model,
                              const std::optional<int64_t>* precision, int64_t streams, int64_t length,
                              std::optional<int64_t> model_id) {
  check_on_cpu(op, argument, model);
  if (precision) {
    check_value(is_floating(model.dtype), op, argument, " has dtype ", dtype_name(model.dtype),
                " and must have float32, float64, float16 or bfloat16");
  } else {
    check_value(model.dtype == DType::kInt32 || model.dtype == DType::kUInt16, op, argument, " has dtype ",
                dtype_name(model.dtype), " and must have int32 or uint16");
  }
  check_value(model.dims >= 1 && model.dims <= 3, op, argument, " has shape ", shape_text(model),
              " and must broadcast to [streams, length, ", precision ? "symbols]" : "symbols + 1]");
  const int last = model.dims - 1;
  CoderModel out;
  out.dtype = model.dtype;
  out.data = model.data;
  out.symbols = model.shape[last] - (precision ? 0 : 1);
  check_value(out.symbols >= 1, op, argument, " has ", model.shape[last],
              " entries in its last dimension and must have at least ", precision ? 1 : 2);
  out.entry_stride = model.strides[last];
  // No streams say no length.
  const int64_t positions = streams == 0 && length == 0 && last > 0 ? model.shape[last - 1] : length;
  out.position_stride = broadcast_stride(op, argument, model, last - 1, positions, "symbols of a stream");
  out.stream_stride = broadcast_stride(op, argument, model, last - 2, streams, "streams");
  if (precision) {
    out.precision = checked_precision(op, *precision, out.symbols);
  } else if (model.dtype == DType::kInt32 && model.count() > 0) {
    const int64_t total = model.as<int32_t>()[out.symbols * out.entry_stride];
    while (out.precision > 1 && int64_t{1} << out.precision > total) --out.precision;
    while (out.precision < kMaxPrecision && int64_t{1} << out.precision < total) ++out.precision;
    check_value(int64_t{1} << out.precision == total, op, argument, " ends in ", total,
                " and must end in a power of two from 2 to 2^", kMaxPrecision);
  }
  if (precision) check_alphabet(op, argument, out.symbols, out.precision);
  check_value(out.symbols <= int64_t{1} << kMaxPrecision, op, argument, " has ", out.symbols,
              " symbols and may have 2^", kMaxPrecision);
  check_value(model_id.value_or(0) >= 0, op, "model_id is ", model_id.value_or(0), " and must be 0 to 2^63 - 1");
  out.has_id = model_id.has_value();
  out.id = static_cast<uint64_t>(model_id.value_or(0));
  return out;
}

// What a stream's frame can say, and the bytes of all streams' memory in an int64: an expanded tensor can have more
// symbols than any memory, and capacities computed for them would overflow.
inline void check_sizes(const char* op, const char* argument, const TensorView& view, const EncodeParams& params) {
  check_value(params.length <= kMostSymbols, op, argument, " has shape ", shape_text(view), ", and a stream may have ",
              kMostSymbols, " symbols");
  check_value(params.streams <= INT64_MAX / 2 / ac_encode_capacity(params), op, argument, " has shape ",
              shape_text(view), ", which is more than any memory holds");
}

// The caller adds memory and results.
inline EncodeParams encode_params(const char* op, const TensorView& symbols, const char* argument,
                                  const TensorView& model, const std::optional<int64_t>* precision,
                                  std::optional<int64_t> model_id, int64_t lanes) {
  check_on_cpu(op, "symbols", symbols);
  check_value(is_integer(symbols.dtype), op, "symbols has dtype ", dtype_name(symbols.dtype),
              " and must have an integer dtype");
  check_value(symbols.dims == 2, op, "symbols has shape ", shape_text(symbols), " and must be [streams, length]");
  check_value(lanes >= 1 && lanes <= kMaxLanes, op, "lanes is ", lanes, " and must be 1 to ", kMaxLanes);
  EncodeParams params;
  params.symbol_dtype = symbols.dtype;
  params.symbols = symbols.data;
  params.streams = symbols.shape[0];
  params.length = symbols.shape[1];
  params.stream_stride = symbols.strides[0];
  params.position_stride = symbols.strides[1];
  params.lanes = lanes;
  params.model = coder_model(op, argument, model, precision, params.streams, params.length, model_id);
  check_sizes(op, "symbols", symbols, params);
  return params;
}

// data [streams, length] uint8; the caller adds memory and results.
inline EncodeParams encode_bytes_params(const char* op, const TensorView& data, int64_t order) {
  check_on_cpu(op, "data", data);
  check_value(data.dtype == DType::kUInt8, op, "data has dtype ", dtype_name(data.dtype), " and must have uint8");
  check_value(data.dims == 2, op, "data has shape ", shape_text(data), " and must be [streams, length]");
  check_value(order == 0 || order == 1, op, "order is ", order, " and must be 0 or 1");
  EncodeParams params;
  params.order = static_cast<int>(order);
  params.symbol_dtype = DType::kUInt8;
  params.symbols = data.data;
  params.streams = data.shape[0];
  params.length = data.shape[1];
  params.stream_stride = data.strides[0];
  params.position_stride = data.strides[1];
  params.model.symbols = 256;
  check_sizes(op, "data", data, params);
  return params;
}

// The sentence for one stream of `op`; `stream` is its name, as "streams[3]".
inline void check_result(const char* op, const std::string& stream, int64_t index, const StreamResult& result,
                         const char* argument, const CoderModel& model) {
  if (result.fault == CoderFault::kNone) return;
  const auto bad_stream = [&](const auto&... parts) { throw BitstreamError(detail::sentence(op, stream, parts...)); };
  const std::string at = "[" + std::to_string(index) + ", " + std::to_string(result.position) + "]";
  switch (result.fault) {
    case CoderFault::kSymbolRange:
      check_index(false, op, "symbols", at, " is ", result.value, " and must be 0 to ", model.symbols - 1);
      break;
    case CoderFault::kNoShare:
      check_value(false, op, "symbols", at, " is ", result.value, ", which ", argument,
                  " gives no share and so cannot be coded");
      break;
    case CoderFault::kNotCumulative:
      check_value(false, op, argument, at, " is no cumulative distribution: it must rise from 0 to ",
                  int64_t{1} << model.precision);
      break;
    case CoderFault::kBadValue: check_value(false, op, argument, at, " has NaN or +infinity and must not"); break;
    case CoderFault::kNoMass:
      check_value(false, op, argument, at, " has nothing above -90852 and must give some symbol mass");
      break;
    case CoderFault::kTruncated: bad_stream(" is truncated"); break;
    case CoderFault::kForeign: bad_stream(" is no stream of pycore"); break;
    case CoderFault::kVersion:
      bad_stream(" has format version ", result.value, ", and this library reads 1 to ", int{kFormatVersion});
      break;
    case CoderFault::kKind: bad_stream(" is of another kind (", result.value, "), which another decoder reads"); break;
    case CoderFault::kExtended: bad_stream(" has bytes after its end"); break;
    case CoderFault::kDamaged: bad_stream(" is damaged: its checksum does not hold"); break;
    case CoderFault::kModel: bad_stream(" was coded with another model"); break;
    case CoderFault::kSymbols:
      bad_stream(" was coded with other distributions: the symbols' checksum does not hold");
      break;
    case CoderFault::kClaim:
      bad_stream(" is damaged: it claims ", result.value, " symbols, and its payload cannot hold them");
      break;
    case CoderFault::kNone: break;
  }
}

inline void check_results(const char* op, const std::vector<StreamResult>& results, const char* argument,
                          const CoderModel& model) {
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].fault == CoderFault::kNone) continue;
    check_result(op, "streams[" + std::to_string(i) + "]", static_cast<int64_t>(i), results[i], argument, model);
  }
}

// What decoding needs beside its parameters: the offsets as they were checked, the frames as they were read.
struct DecodeMemory {
  IndexCopies copies;
  std::vector<StreamResult> results;
  std::vector<Frame> frames;
};

// data [bytes] uint8 and offsets [streams + 1] int64, which the caller has made contiguous.
inline DecodeParams decode_params(const char* op, const TensorView& data, const TensorView& offsets,
                                  DecodeMemory* memory) {
  check_on_cpu(op, "data", data);
  check_on_cpu(op, "offsets", offsets);
  check_value(data.dtype == DType::kUInt8 && data.dims == 1, op, "data is ", dtype_name(data.dtype), " ",
              shape_text(data), " and must be uint8 [bytes]");
  check_value(offsets.dtype == DType::kInt64 && offsets.dims == 1 && offsets.shape[0] >= 1, op, "offsets is ",
              dtype_name(offsets.dtype), " ", shape_text(offsets), " and must be int64 [streams + 1]");
  check_contiguous(op, "data", data);
  check_contiguous(op, "offsets", offsets);
  DecodeParams params;
  params.data = data.as<uint8_t>();
  params.offsets = memory->copies.keep(op, offsets.as<const int64_t>(), offsets.shape[0]);
  params.streams = offsets.shape[0] - 1;
  memory->results = memory_for<StreamResult>(op, "the results of streams", params.streams);
  memory->frames = memory_for<Frame>(op, "the frames of streams", params.streams);
  params.results = memory->results.data();
  params.frames = memory->frames.data();
  int64_t before = 0;
  for (int64_t i = 0; i <= params.streams; ++i) {
    check_value(params.offsets[i] >= before && params.offsets[i] <= data.shape[0], op, "offsets[", i, "] is ",
                params.offsets[i], " and must be ", before, " to ", data.shape[0]);
    before = params.offsets[i];
  }
  return params;
}

// After ac_open_streams(): the number of symbols in each stream, which must be the same for all.
inline int64_t common_length(const char* op, const std::vector<StreamResult>& results) {
  for (size_t i = 1; i < results.size(); ++i) {
    check_value(results[i].count == results[0].count, op, "streams have ", results[0].count, " and ", results[i].count,
                " symbols (0 and ", i, ") and must have equally many: decode them apart");
  }
  return results.empty() ? 0 : results[0].count;
}

// ---- torchac's format -----------------------------------------------------------------------------------------------

// cdf [..., symbols + 1], int16 whose bits are those of uint16; the caller adds data or out, and result.
inline BitwiseParams bitwise_params(const char* op, const TensorView& cdf) {
  check_on_cpu(op, "cdf", cdf);
  check_value(cdf.dtype == DType::kInt16 || cdf.dtype == DType::kUInt16, op, "cdf has dtype ", dtype_name(cdf.dtype),
              " and must have int16 or uint16");
  check_value(cdf.dims >= 1 && cdf.shape[cdf.dims - 1] >= 2, op, "cdf has shape ", shape_text(cdf),
              " and must be [..., symbols + 1]");
  BitwiseParams params;
  params.model.cdf = cdf.data;
  params.model.rows = row_view(cdf);
  params.model.entry_stride = cdf.strides[cdf.dims - 1];
  params.model.symbols = cdf.shape[cdf.dims - 1] - 1;
  check_value(params.model.symbols <= 32767, op, "cdf has ", params.model.symbols, " symbols and may have 32767");
  check_value(params.model.rows.rows <= kMostSymbols, op, "cdf has ", params.model.rows.rows, " rows and may have ",
              kMostSymbols);
  return params;
}

inline void check_bitwise_symbols(const char* op, const TensorView& symbols, const TensorView& cdf,
                                  BitwiseParams* params) {
  check_on_cpu(op, "sym", symbols);
  check_value(is_integer(symbols.dtype), op, "sym has dtype ", dtype_name(symbols.dtype),
              " and must have an integer dtype");
  bool same = symbols.dims == cdf.dims - 1 && symbols.dims < kMaxDims;
  for (int i = 0; same && i < symbols.dims; ++i) same = symbols.shape[i] == cdf.shape[i];
  check_value(same, op, "sym has shape ", shape_text(symbols), ", which is not that of cdf's rows: ", shape_text(cdf));
  TensorView column = symbols;  // [..., 1]
  column.shape[column.dims] = 1;
  column.strides[column.dims++] = 1;
  params->symbol_dtype = symbols.dtype;
  params->symbols = row_view(column);
}

inline void check_bitwise_data(const char* op, const TensorView& data, BitwiseParams* params) {
  check_on_cpu(op, "byte_stream", data);
  check_value(data.dtype == DType::kUInt8 && data.dims == 1 && data.contiguous(), op, "byte_stream is ",
              dtype_name(data.dtype), " ", shape_text(data), " and must be contiguous uint8 [bytes]");
  params->data = data.as<uint8_t>();
  params->bytes = data.shape[0];
}

inline void check_bitwise_result(const char* op, const StreamResult& result) {
  const int64_t at = result.position;
  check_index(result.fault != CoderFault::kSymbolRange, op, "symbol ", at, " is ", result.value,
              ", which cdf does not have");
  check_value(result.fault != CoderFault::kNoShare, op, "symbol ", at, " is ", result.value,
              ", which cdf gives no share and so cannot be coded");
  check_value(result.fault != CoderFault::kNotCumulative, op, "row ", at, " of cdf falls somewhere and must not");
  if (result.fault == CoderFault::kNone) return;
  const bool length = result.fault == CoderFault::kTruncated;
  throw BitstreamError(detail::sentence(
      op, "byte_stream ", length ? "is truncated or has bytes after its end" : "was coded with another cdf"));
}

}  // namespace pycore
