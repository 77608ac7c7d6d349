// SPDX-License-Identifier: Apache-2.0
// Encoding a stream, and rows of quantize_cdf, for one instruction set.
#pragma once

#include <pycore/arithmetic_coding/frame.h>

#include <cstdint>

#include "rows.inl.h"

struct Writer {
  RangeEncoder coder;
  uint8_t* out;
};

inline void store_word(uint8_t* out, uint16_t word) {
  word = __builtin_bswap16(word);
  __builtin_memcpy(out, &word, 2);
}

// Adds one to what has been written. There is a word to take it: low + range never passes the first 2^64.
inline void carry(uint8_t* end) {
  do {
    --end;
  } while (++*end == 0);
}

// Precision up to 16 needs one word at most, and whether it does is no branch: it would be a coin's flip.
template <bool kFine>
inline void put_symbol(Writer* writer, Share share, int precision) {
  RangeEncoder coder = writer->coder;
  if (__builtin_expect(range_encode(&coder, share.begin, share.width, precision), 0)) carry(writer->out);
  if (kFine) {
    while (range_needs_word(coder.range)) {
      store_word(writer->out, range_take_word(&coder));
      writer->out += 2;
    }
  } else {
    // range >= 2^32, so its leading zeros are below 32 and have 16 in them where it is below 2^48.
    const int shift = __builtin_clzll(coder.range) & 16;
    store_word(writer->out, static_cast<uint16_t>(coder.low >> 48));
    writer->out += shift >> 3;
    coder.low <<= shift;
    coder.range <<= shift;
  }
  writer->coder = coder;
}

// Ends a lane that began at `begin`: the last word, without the zeros that a decoder reads past the end anyway.
inline void finish_lane(Writer* writer, const uint8_t* begin) {
  uint16_t word;
  if (range_finish(&writer->coder, &word)) carry(writer->out);
  store_word(writer->out, word);
  writer->out += 2;
  while (writer->out > begin && writer->out[-1] == 0) --writer->out;
}

struct StaticRow {
  const uint32_t* row;
  CoderFault share(int64_t, int32_t symbol, Share* out) const {
    out->begin = row[symbol];
    out->width = row[symbol + 1] - row[symbol];
    return __builtin_expect(out->width == 0, 0) ? CoderFault::kNoShare : CoderFault::kNone;
  }
};

// Symbols lane, lane + lanes, ... of a stream. crc, if not null, takes them all up.
template <bool kFine, class Rows>
bool encode_lane(const EncodeParams& params, const Rows& rows, int64_t stream, int64_t lane, Writer* writer,
                 uint32_t* crc, StreamResult* result) {
  int32_t block[kSymbolBlock];
  Writer local = *writer;
  const int64_t step = params.lanes, precision = params.model.precision;
  for (int64_t position = lane; position < params.length; position += kSymbolBlock * step) {
    const int64_t left = (params.length - position + step - 1) / step;
    const int64_t count = left < kSymbolBlock ? left : kSymbolBlock;
    if (!read_symbols(params, stream, position, step, count, block, result)) return false;
    if (crc) *crc = add_symbols(*crc, block, count);
    for (int64_t i = 0; i < count; ++i) {
      Share share;
      const CoderFault fault = rows.share(position + i * step, block[i], &share);
      if (__builtin_expect(fault != CoderFault::kNone, 0)) {
        result->fault = fault;
        result->position = position + i * step;
        result->value = block[i];
        return false;
      }
      put_symbol<kFine>(&local, share, static_cast<int>(precision));
    }
  }
  *writer = local;
  return true;
}

template <class Rows>
bool encode_lanes(const EncodeParams& params, const Rows& rows, int64_t stream, uint8_t* out, uint32_t* crc,
                  StreamResult* result) {
  uint8_t* const lengths = out + kFrameBytes;
  Writer writer{{}, lengths + 6 * (params.lanes - 1)};
  for (int64_t lane = 0; lane < params.lanes; ++lane) {
    const uint8_t* begin = writer.out;
    writer.coder = RangeEncoder();
    uint32_t* lane_crc = params.lanes == 1 ? crc : nullptr;
    const bool good = params.model.precision > 16
                          ? encode_lane<true>(params, rows, stream, lane, &writer, lane_crc, result)
                          : encode_lane<false>(params, rows, stream, lane, &writer, lane_crc, result);
    if (!good) return false;
    finish_lane(&writer, begin);
    if (lane < params.lanes - 1) put_bytes(lengths + 6 * lane, static_cast<uint64_t>(writer.out - begin), 6);
  }
  if (params.lanes > 1) {  // the lanes took the symbols in another order
    int32_t block[kSymbolBlock];
    for (int64_t position = 0; position < params.length; position += kSymbolBlock) {
      const int64_t left = params.length - position, count = left < kSymbolBlock ? left : kSymbolBlock;
      if (!read_symbols(params, stream, position, 1, count, block, result)) return false;
      *crc = add_symbols(*crc, block, count);
    }
  }
  result->bytes = writer.out - out;
  return true;
}

void encode_stream(const EncodeParams& params, int64_t stream, void* scratch) {
  const CoderModel& model = params.model;
  StreamResult* result = params.results + stream;
  *result = StreamResult();
  result->count = params.length;
  uint8_t* out = params.memory + stream * ac_encode_capacity(params);
  Frame frame;
  frame.has_id = model.has_id;
  frame.lanes = params.lanes;
  frame.model = model.has_id ? model.id : kFingerprintStart;
  frame.count = params.length;
  uint32_t crc = ~0u;
  const Slot slot = slot_of(scratch, model.symbols);
  with_rows(model, stream, slot, [&](const auto& rows) {
    const bool fixed = model.position_stride == 0 || params.length <= 1;
    if (params.length > 0 && (fixed || !model.has_id)) {
      prepare_slot(slot, model, row_key(model, stream), rows);
      if (slot.header->fault != CoderFault::kNone) {
        result->fault = slot.header->fault;
        return;
      }
      if (!model.has_id) frame.model = slot.header->fingerprint;
    }
    if (fixed) {
      encode_lanes(params, StaticRow{slot.row}, stream, out, &crc, result);
    } else {
      encode_lanes(params, rows, stream, out, &crc, result);
    }
  });
  if (result->fault != CoderFault::kNone) return;
  frame.symbols_crc = ~crc;
  frame.payload = result->bytes - kFrameBytes;
  write_frame(out, frame);
  put_bytes(out + kCrcOffset, frame_crc(out, result->bytes, add_bytes), 4);
}

void quantize_row(const QuantizeParams& params, int64_t row, void* scratch) {
  const Slot slot = slot_of(scratch, params.symbols);
  const int64_t offset = params.values.offset(row);
  uint64_t sum = 0;
  CoderFault fault;
  if (params.logits) {
    const float* logits =
        float_row(params.dtype, params.values.data, offset, params.entry_stride, params.symbols, slot.floats);
    int32_t highest;
    fault = highest_point(logits, params.symbols, &highest);
    if (fault == CoderFault::kNone) sum = logit_counts(logits, params.symbols, highest, slot.counts, slot.blocks);
    if (fault == CoderFault::kNone && sum == 0) fault = CoderFault::kNoMass;  // another thread wrote to them since
  } else {
    fault = counts_of_probs(params.dtype, params.values.data, offset, params.entry_stride, params.symbols, slot.floats,
                            slot.counts, &sum);
  }
  if (fault == CoderFault::kNone) {
    cumulate_counts(slot.counts, sum, params.symbols, params.precision, params.cdf + row * (params.symbols + 1));
    return;
  }
  const int64_t code = row * 16 + static_cast<int64_t>(fault);
  int64_t lowest = __atomic_load_n(params.fault, __ATOMIC_RELAXED);
  while (code < lowest &&
         !__atomic_compare_exchange_n(params.fault, &lowest, code, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
