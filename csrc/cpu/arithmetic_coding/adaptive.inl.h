// SPDX-License-Identifier: Apache-2.0
// Bytes with adaptive models (coder_math.h has the rule), for one instruction set. A context is one or two vectors; the
// loops over its sixteen entries are written for the compiler to make vectors of.
#pragma once

#include <pycore/arithmetic_coding/frame.h>

#include <cstdint>

#include "decode.inl.h"
#include "encode.inl.h"

struct AdaptiveModel {
  uint16_t (*entries)[kNibbles];
  uint8_t* uses;
};

AdaptiveModel start_model(void* scratch, int order) {
  const int64_t contexts = adaptive_contexts(order);
  AdaptiveModel model{static_cast<uint16_t (*)[kNibbles]>(scratch),
                      static_cast<uint8_t*>(scratch) + contexts * kNibbles * 2};
  for (int64_t context = 0; context < contexts; ++context) {
    for (int i = 0; i < kNibbles; ++i) model.entries[context][i] = static_cast<uint16_t>(2048 * i);
    model.uses[context] = 0;
  }
  return model;
}

inline Share nibble_share(const uint16_t* entries, int symbol) {
  const uint32_t begin = entries[symbol];
  const uint32_t end = symbol == kNibbles - 1 ? 1u << kAdaptivePrecision : entries[symbol + 1];
  return {begin, end - begin};
}

inline void learn_nibble(const AdaptiveModel& model, int64_t context, int symbol) {
  const int uses = model.uses[context];
  model.uses[context] = static_cast<uint8_t>(uses + (uses < kMostUses));
  move_entries(model.entries[context], symbol, adaptive_rate(uses));
}

void encode_bytes(const EncodeParams& params, int64_t stream, void* scratch) {
  StreamResult* result = params.results + stream;
  *result = StreamResult();
  result->count = params.length;
  const AdaptiveModel model = start_model(scratch, params.order);
  uint8_t* out = params.memory + stream * ac_encode_capacity(params);
  Writer writer{{}, out + kFrameBytes};
  const uint8_t* bytes = static_cast<const uint8_t*>(params.symbols) + stream * params.stream_stride;
  uint32_t crc = ~0u;
  int64_t first = 0;  // of the contexts after the byte before
  for (int64_t i = 0; i < params.length; ++i) {
    const uint8_t byte = bytes[i * params.position_stride];
    const int high = byte >> 4, low = byte & 15;
    crc = crc_four(crc, byte);
    put_symbol<false>(&writer, nibble_share(model.entries[first], high), kAdaptivePrecision);
    learn_nibble(model, first, high);
    put_symbol<false>(&writer, nibble_share(model.entries[first + 1 + high], low), kAdaptivePrecision);
    learn_nibble(model, first + 1 + high, low);
    if (params.order == 1) first = int64_t{byte} * kByteContexts;
  }
  finish_lane(&writer, out + kFrameBytes);
  Frame frame;
  frame.kind = params.order == 1 ? kBytesOrder1 : kBytesOrder0;
  frame.model = kFingerprintStart;
  frame.symbols_crc = ~crc;
  frame.count = params.length;
  frame.payload = writer.out - out - kFrameBytes;
  result->bytes = writer.out - out;
  write_frame(out, frame);
  put_bytes(out + kCrcOffset, frame_crc(out, result->bytes, add_bytes), 4);
}

// *spent grows by what the nibble is worth at least, in bits times 2^kAdaptivePrecision.
inline int take_nibble(Reader* reader, const AdaptiveModel& model, int64_t context, int64_t* spent) {
  // A damaged code may lie beyond the model; it is folded into it, and the CRC of the symbols tells.
  const uint32_t value =
      static_cast<uint32_t>(range_locate(reader->coder, kAdaptivePrecision)) & ((1u << kAdaptivePrecision) - 1);
  const int symbol = find_nibble(model.entries[context], value);
  const Share share = nibble_share(model.entries[context], symbol);
  *spent += (1 << kAdaptivePrecision) - static_cast<int64_t>(share.width);
  take_symbol<false, true>(reader, share, kAdaptivePrecision);
  learn_nibble(model, context, symbol);
  return symbol;
}

struct AdaptiveDecoder {
  Reader reader;
  AdaptiveModel model;
  int order;
  int64_t first = 0;  // of the contexts after the byte before

  uint8_t take(int64_t* spent) {
    const int high = take_nibble(&reader, model, first, spent);
    const int low = take_nibble(&reader, model, first + 1 + high, spent);
    const uint8_t byte = static_cast<uint8_t>(high << 4 | low);
    if (order == 1) first = int64_t{byte} * kByteContexts;
    return byte;
  }
};

bool open_adaptive(const DecodeParams& params, int64_t stream, void* scratch, AdaptiveDecoder* decoder) {
  const uint8_t* begin = params.data + params.offsets[stream] + kFrameBytes;
  const Frame& frame = params.frames[stream];
  if (frame.lanes != 1 || frame.has_id || frame.model != kFingerprintStart) {
    params.results[stream].fault = CoderFault::kForeign;
    return false;
  }
  decoder->order = frame.kind == kBytesOrder1 ? 1 : 0;
  decoder->model = start_model(scratch, decoder->order);
  decoder->reader = open_lane(begin, begin + frame.payload);
  return true;
}

void decode_bytes(const DecodeParams& params, int64_t stream, void* scratch) {
  AdaptiveDecoder opened;
  if (!open_adaptive(params, stream, scratch, &opened)) return;
  AdaptiveDecoder decoder = opened;  // in registers
  uint8_t* out = params.bytes + stream * params.length;
  uint32_t crc = ~0u;
  int64_t spent = 0;
  for (int64_t i = 0; i < params.length; ++i) {
    out[i] = decoder.take(&spent);
    crc = crc_four(crc, out[i]);
  }
  if (~crc != params.frames[stream].symbols_crc) params.results[stream].fault = CoderFault::kSymbols;
}
