// SPDX-License-Identifier: Apache-2.0
// Arithmetic coding: one stream per row of symbols, with a row of cumulative frequencies per symbol, or one for all.
// coder_math.h has the arithmetic, arithmetic_coding_frame.h the 32 bytes before each payload, docs/formats.md both in
// words.
//
// A stream is one piece of work; its bytes depend on its symbols and its rows alone, never on threads or other streams.
// Kernels report what is wrong with values in `StreamResult`; the faces make exceptions of it.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/row_view.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

inline constexpr int64_t kMaxLanes = 64;

enum class CoderFault : int32_t {
  kNone,
  // The caller's arguments.
  kSymbolRange,    // value: the symbol
  kNoShare,        // value: the symbol, to which the row gives nothing
  kNotCumulative,  // the row falls somewhere, or does not go from 0 to 2^precision
  kBadValue,       // a row of probabilities or logits with NaN, infinity or a negative probability
  kNoMass,         // a row of them without anything in it
  // The stream.
  kTruncated,
  kForeign,  // no stream of this format
  kVersion,  // value: its version
  kKind,     // value: its kind, which another function decodes
  kExtended,
  kDamaged,  // the CRC of the bytes
  kModel,    // another fingerprint or model_id
  kSymbols,  // the CRC of the decoded symbols, or a code that no row has
  kClaim,    // value: how many symbols the frame says there are, and its payload cannot hold
};

struct StreamResult {
  CoderFault fault = CoderFault::kNone;
  int64_t position = 0;  // of the symbol at fault
  int64_t value = 0;
  int64_t count = 0;  // symbols
  int64_t bytes = 0;  // frame and payload
};

// What a stream's frame says, read once: nobody may change it between a check and its use.
struct Frame {
  uint8_t kind = 0;
  bool has_id = false;
  int64_t lanes = 1;
  uint32_t crc = 0, symbols_crc = 0;
  uint64_t model = 0;
  int64_t count = 0, payload = 0;
};

// What gives each symbol its share: cumulative frequencies (int32, or uint16 with precision 16 and 2^16 stored as 0),
// or logits (float32, float16, bfloat16, float64), which become cumulative frequencies as in quantize_cdf.
struct CoderModel {
  DType dtype = DType::kInt32;
  const void* data = nullptr;  // [streams, length, symbols + 1], or [streams, length, symbols] logits
  int64_t stream_stride = 0, position_stride = 0, entry_stride = 1;  // in elements; 0 where one serves all
  int64_t symbols = 0;
  int precision = 16;
  bool has_id = false;  // id takes the place of the fingerprint of the stream's first row
  uint64_t id = 0;
};

// Adaptive models of bytes need no distributions: encoder and decoder learn the same ones from what they have coded, by
// the rules in coder_math.h. Order 0 learns the bytes, order 1 the bytes after each byte.
inline constexpr int kNoOrder = -1;

struct EncodeParams {
  CpuIsa isa = cpu_isa();              // of the whole call, asked once: scratch and kernel must agree
  int order = kNoOrder;                // 0 or 1: symbols are bytes, and model is not used
  DType symbol_dtype = DType::kInt64;  // any integer
  const void* symbols = nullptr;       // [streams, length]
  int64_t stream_stride = 0, position_stride = 0;
  int64_t streams = 0, length = 0;
  int64_t lanes = 1;
  CoderModel model;
  uint8_t* memory = nullptr;  // [streams, ac_encode_capacity(params)], of which each stream fills its results[].bytes
  StreamResult* results = nullptr;  // [streams]
};

struct DecodeParams {
  CpuIsa isa = cpu_isa();            // of the whole call, asked once: scratch and kernel must agree
  const uint8_t* data = nullptr;     // all streams
  const int64_t* offsets = nullptr;  // [streams + 1], into data
  int64_t streams = 0, length = 0;
  CoderModel model;
  bool adaptive = false;            // streams of adaptive models, decoded to bytes; model is not used
  int64_t* symbols = nullptr;       // [streams, length], contiguous
  uint8_t* bytes = nullptr;         // the same, in place of symbols
  StreamResult* results = nullptr;  // [streams]
  Frame* frames = nullptr;          // [streams], filled by ac_open_streams()
};

struct QuantizeParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // float32, float64, float16, bfloat16
  bool logits = false;
  int precision = 16;
  int64_t symbols = 0;
  RowView values;            // [rows, symbols]
  int64_t entry_stride = 1;  // of values' last dimension, in elements
  int32_t* cdf = nullptr;    // [rows, symbols + 1], contiguous
  int64_t* fault = nullptr;  // in: kNoFault; out: the lowest row at fault * 16 + its CoderFault
};
inline constexpr int64_t kNoFault = INT64_MAX;

// CPU. `scratch` holds …_scratch(params, threads) bytes, 64-byte aligned.
PYCORE_API int64_t quantize_cdf_scratch(const QuantizeParams& params, int64_t threads);
PYCORE_API Status quantize_cdf(const QuantizeParams& params, const Parallel& parallel, void* scratch);

// The most bytes a stream of these may take.
PYCORE_API int64_t ac_encode_capacity(const EncodeParams& params);
PYCORE_API int64_t ac_encode_scratch(const EncodeParams& params, int64_t threads);
PYCORE_API Status ac_encode(const EncodeParams& params, const Parallel& parallel, void* scratch);
// Moves the streams together: stream i to data + offsets[i].
PYCORE_API Status ac_pack_streams(const EncodeParams& params, const int64_t* offsets, uint8_t* data,
                                  const Parallel& parallel);

// Reads the frames, checks the bytes of each stream and fills results with faults and counts. Needs data, offsets,
// streams, results and frames; ac_decode() relies on it.
PYCORE_API Status ac_open_streams(const DecodeParams& params, const Parallel& parallel);
PYCORE_API int64_t ac_decode_scratch(const DecodeParams& params, int64_t threads);
// Before there is memory for the symbols: a fault for each stream whose frame claims more than its payload can hold, or
// so much beside it that it was decoded once, without being kept, and was not what was coded. With ac_decode()'s
// scratch.
PYCORE_API Status ac_check_claims(const DecodeParams& params, const Parallel& parallel, void* scratch);
// Every stream has params.length symbols, and no fault yet.
PYCORE_API Status ac_decode(const DecodeParams& params, const Parallel& parallel, void* scratch);

// ---- torchac's format -----------------------------------------------------------------------------------------------
// The arithmetic coder of Witten, Neal and Cleary (1987) with 32-bit bounds, 16-bit cumulative frequencies and bits
// written one after another, the highest of a byte first: what torchac writes. A stream has no frame and no checksum.

struct BitwiseModel {
  const void* cdf = nullptr;  // uint16 [rows, symbols + 1], of which the last is taken to be 2^16
  RowView rows;               // how rows lie
  int64_t entry_stride = 1, symbols = 0;
};

struct BitwiseParams {
  BitwiseModel model;
  DType symbol_dtype = DType::kInt16;  // encoding: any integer
  RowView symbols;                     // encoding: [rows, 1]
  uint8_t* data = nullptr;             // encoding: bitwise_capacity() bytes, written; decoding: read
  int64_t bytes = 0;                   // decoding: of data
  int16_t* out = nullptr;              // decoding: [rows]
  StreamResult* result = nullptr;      // one; encoding gives its bytes
};

PYCORE_API int64_t bitwise_capacity(const BitwiseParams& params);
PYCORE_API Status bitwise_encode(const BitwiseParams& params);
// The faults of a stream are kTruncated (or bytes after its end: the format does not say which) and kSymbols.
PYCORE_API Status bitwise_decode(const BitwiseParams& params);

}  // namespace pycore
