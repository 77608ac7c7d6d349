// SPDX-License-Identifier: Apache-2.0
// Decoding streams, for one instruction set.
#pragma once

#include <pycore/arithmetic_coding/frame.h>

#include <cstdint>

#include "rows.inl.h"

// A stretch of payload; words past its end are zero.
struct Reader {
  RangeDecoder coder;
  const uint8_t *next, *end;

  uint16_t word() const {
    if (__builtin_expect(end - next >= 2, 1)) {
      uint16_t word;
      __builtin_memcpy(&word, next, 2);
      return __builtin_bswap16(word);
    }
    return end - next == 1 ? static_cast<uint16_t>(*next << 8) : 0;
  }
  void skip(int64_t bytes) { next = end - next > bytes ? next + bytes : end; }
};

inline Reader open_lane(const uint8_t* begin, const uint8_t* end) {
  Reader reader{{}, begin, end};
  for (int i = 0; i < 4; ++i) {
    reader.coder.code = reader.coder.code << 16 | reader.word();
    reader.skip(2);
  }
  return reader;
}

// kChecked: the payload may end here. Otherwise the caller knows that it does not, and precision is at most 16.
template <bool kFine, bool kChecked>
inline void take_symbol(Reader* reader, Share share, int precision) {
  RangeDecoder coder = reader->coder;
  range_consume(&coder, share.begin, share.width, precision);
  if (kFine) {
    while (range_needs_word(coder.range)) {
      range_put_word(&coder, reader->word());
      reader->skip(2);
    }
  } else {
    // Whether a word is needed is no branch: it would be a coin's flip. range >= 2^32, so its leading zeros are below
    // 32 and have 16 in them where it is below 2^48. A damaged code with a range of 0 comes here too, hence the bit.
    const int shift = __builtin_clzll(coder.range | 1) & 16;
    uint16_t word;
    if (kChecked) {
      word = reader->word();
    } else {
      __builtin_memcpy(&word, reader->next, 2);
      word = __builtin_bswap16(word);
    }
    coder.code = coder.code << shift | static_cast<uint64_t>(word) >> (shift ^ 16);
    coder.range <<= shift;
    if (kChecked) {
      reader->skip(shift >> 3);
    } else {
      reader->next += shift >> 3;
    }
  }
  reader->coder = coder;
}

// `count` symbols of one stream, from row 0 on. A code that no row has ends it, and *position says where.
template <bool kFine, class Rows>
CoderFault decode_rows(Reader reader, const Rows& rows, int64_t first, int64_t step, int64_t count, int precision,
                       int64_t* out, int64_t* position) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t value = range_locate(reader.coder, precision);
    Share share;
    const CoderFault fault = value >> precision != 0 ? CoderFault::kSymbols
                                                     : rows.find(first + i * step, static_cast<uint32_t>(value),
                                                                 out + (first + i * step), &share);
    if (__builtin_expect(fault != CoderFault::kNone, 0)) {
      *position = first + i * step;
      return fault;
    }
    take_symbol<kFine, true>(&reader, share, precision);
  }
  return CoderFault::kNone;
}

// kLanes stretches of payload at once, all with the model in the slot: symbol i of stretch l goes to out[l][i * step].
// The values of a damaged code may lie beyond the model; they are folded into it, and the CRC of the symbols tells.
template <bool kFine, bool kChecked, int kLanes>
void decode_run(Reader* reader, const Slot& slot, int64_t begin, int64_t end, int precision, int64_t* const* out,
                int64_t step) {
  const uint32_t* row = slot.row;
  const auto* buckets = static_cast<const typename Buckets<kFine>::Symbol*>(slot.buckets);
  const int shift = bucket_shift<kFine>(precision);
  const uint64_t mask = (uint64_t{1} << precision) - 1;
  for (int64_t i = begin; i < end; ++i) {
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t value = static_cast<uint32_t>(range_locate(reader[l].coder, precision) & mask);
      const int64_t symbol = find_in_buckets(row, buckets, shift, value);
      out[l][i * step] = symbol;
      take_symbol<kFine, kChecked>(&reader[l], {row[symbol], row[symbol + 1] - row[symbol]}, precision);
    }
  }
}

template <bool kFine, int kLanes>
void decode_together(Reader* readers, const Slot& slot, int64_t count, int precision, int64_t* const* outs,
                     int64_t step) {
  Reader reader[kLanes];
  int64_t* out[kLanes];
  for (int l = 0; l < kLanes; ++l) reader[l] = readers[l], out[l] = outs[l];
  int64_t i = 0;
  // A symbol takes one word at most, so that many symbols need no look at the end.
  while (!kFine && i < count) {
    int64_t sure = count - i;
    for (int l = 0; l < kLanes; ++l) {
      const int64_t words = (reader[l].end - reader[l].next) / 2;
      sure = words < sure ? words : sure;
    }
    if (sure < 16) break;
    decode_run<kFine, false, kLanes>(reader, slot, i, i + sure, precision, out, step);
    i += sure;
  }
  decode_run<kFine, true, kLanes>(reader, slot, i, count, precision, out, step);
  for (int l = 0; l < kLanes; ++l) readers[l] = reader[l];
}

// Any number of stretches, the first `longer` of which have one symbol more than `count`.
template <bool kFine>
void decode_static(Reader* readers, int64_t lanes, const Slot& slot, int64_t count, int64_t longer, int precision,
                   int64_t** outs, int64_t step) {
  int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) decode_together<kFine, 4>(readers + l, slot, count, precision, outs + l, step);
  for (; l < lanes; ++l) decode_together<kFine, 1>(readers + l, slot, count, precision, outs + l, step);
  for (l = 0; l < longer; ++l) {
    int64_t* one = outs[l] + count * step;
    decode_together<kFine, 1>(readers + l, slot, 1, precision, &one, step);
  }
}

// One stream of precision 16 with the model in the slot. Each step waits for the one before: division, table, products,
// renormalisation; so the table gives the whole share, and what follows if a word is needed, and what if not, are both
// at hand before it is known which. A code that the model does not have ends it; until then code < 2^16 units, and no
// share that is found is empty. *crc takes the symbols up, which costs nothing beside that chain.
CoderFault decode_alone(Reader reader, const Slot& slot, int64_t count, int64_t* out, uint32_t* crc) {
  const uint32_t* const row = slot.row;
  const uint16_t *const begins = slot.shares, *const widths = begins + kShareStretches;
  const uint16_t* const symbols = widths + kShareStretches;
  uint32_t sum = *crc;
  int64_t i = 0;
  while (i < count) {
    const int64_t words = (reader.end - reader.next) / 2, sure = words < count - i ? words : count - i;
    if (sure < 16) break;
    uint64_t code = reader.coder.code, unit = reader.coder.range >> 16;
    const uint8_t* next = reader.next;
    for (const int64_t stop = i + sure; i < stop; ++i) {
      const uint64_t stretch = code / (unit << kShareShift);
      if (__builtin_expect(stretch >= kShareStretches, 0)) return CoderFault::kSymbols;
      uint64_t begin = begins[stretch], width = widths[stretch], symbol = symbols[stretch];
      if (__builtin_expect(width == 0, 0)) {
        while (code >= unit * row[symbol + 1]) ++symbol;
        begin = row[symbol];
        width = row[symbol + 1] - begin;
      }
      out[i] = static_cast<int64_t>(symbol);
      sum = crc_four(sum, static_cast<uint32_t>(symbol));
      const uint64_t range = unit * width;
      code -= unit * begin;
      uint16_t word;
      __builtin_memcpy(&word, next, 2);
      const uint64_t with_word = code << 16 | __builtin_bswap16(word);
      const uint8_t* const after = next + 2;
      // if (range_needs_word(range)) unit = range (<< 16 >> 16), code = with_word, next = after. As good as random.
      unit = range >> 16;
      asm("cmpq %[least], %[range]\n\tcmovbq %[range], %[unit]\n\tcmovbq %[with_word], %[code]\n\t"
          "cmovbq %[after], %[next]"
          : [unit] "+&r"(unit), [code] "+&r"(code), [next] "+&r"(next)
          : [range] "r"(range), [with_word] "r"(with_word), [after] "r"(after), [least] "r"(kLeastRange)
          : "cc");
    }
    reader.coder.code = code;
    reader.coder.range = unit << 16;  // the bits below are never looked at again
    reader.next = next;
  }
  for (; i < count; ++i) {
    const uint64_t value = range_locate(reader.coder, 16);
    if (__builtin_expect(value >> 16 != 0, 0)) return CoderFault::kSymbols;
    int64_t symbol = symbols[value >> kShareShift];
    while (row[symbol + 1] <= value) ++symbol;
    out[i] = symbol;
    sum = crc_four(sum, static_cast<uint32_t>(symbol));
    take_symbol<false, true>(&reader, {row[symbol], row[symbol + 1] - row[symbol]}, 16);
  }
  *crc = sum;
  return CoderFault::kNone;
}

// The lanes of a stream as readers; false if their lengths do not add up.
bool open_lanes(const uint8_t* stream, const Frame& frame, Reader* readers) {
  const uint8_t *lengths = stream + kFrameBytes, *end = lengths + frame.payload;
  if (frame.payload < 6 * (frame.lanes - 1)) return false;
  const uint8_t* begin = lengths + 6 * (frame.lanes - 1);
  for (int64_t lane = 0; lane < frame.lanes; ++lane) {
    int64_t bytes = end - begin;
    if (lane < frame.lanes - 1) {
      const int64_t wanted = static_cast<int64_t>(get_bytes(lengths + 6 * lane, 6));
      if (wanted > bytes) return false;
      bytes = wanted;
    }
    readers[lane] = open_lane(begin, begin + bytes);
    begin += bytes;
  }
  return true;
}

void check_symbols(const DecodeParams& params, int64_t stream, const Frame& frame) {
  StreamResult* result = params.results + stream;
  if (result->fault != CoderFault::kNone) return;
  const uint32_t crc = ~add_symbols(~0u, params.symbols + stream * params.length, params.length);
  if (crc != frame.symbols_crc) result->fault = CoderFault::kSymbols;
}

// Prepares the slot for the stream's first row and compares the model. True: the stream may be decoded.
template <class Rows>
bool model_fits(const DecodeParams& params, int64_t stream, const Frame& frame, const Slot& slot, const Rows& rows,
                bool fixed) {
  const CoderModel& model = params.model;
  StreamResult* result = params.results + stream;
  uint64_t expected = model.has_id ? model.id : kFingerprintStart;
  if (params.length > 0 && (fixed || !model.has_id)) {
    prepare_slot(slot, model, row_key(model, stream), rows);
    if (slot.header->fault != CoderFault::kNone) {
      result->fault = slot.header->fault;
      return false;
    }
    if (!model.has_id) expected = slot.header->fingerprint;
  }
  if (frame.has_id == model.has_id && frame.model == expected) return true;
  result->fault = CoderFault::kModel;
  return false;
}

void decode_stream(const DecodeParams& params, int64_t stream, const Slot& slot) {
  const CoderModel& model = params.model;
  const Frame& frame = params.frames[stream];
  StreamResult* result = params.results + stream;
  const bool fixed = model.position_stride == 0 || params.length <= 1;
  int64_t* symbols = params.symbols + stream * params.length;
  bool checked = false;
  with_rows(model, stream, slot, [&](const auto& rows) {
    if (!model_fits(params, stream, frame, slot, rows, fixed)) return;
    Reader readers[kMaxLanes];
    if (!open_lanes(params.data + params.offsets[stream], frame, readers)) {
      result->fault = CoderFault::kForeign;
      return;
    }
    const int precision = model.precision;
    const int64_t lanes = frame.lanes, count = params.length / lanes, longer = params.length % lanes;
    if (fixed && lanes == 1 && precision == 16 && !is_fine(model) && count > 0) {
      prepare_shares(slot);
      uint32_t crc = ~0u;
      result->fault = decode_alone(readers[0], slot, count, symbols, &crc);
      if (result->fault == CoderFault::kNone && ~crc != frame.symbols_crc) result->fault = CoderFault::kSymbols;
      checked = true;
      return;
    }
    if (fixed) {
      if (count + longer > 0) prepare_buckets(slot, model);
      int64_t* outs[kMaxLanes];
      for (int64_t lane = 0; lane < lanes; ++lane) outs[lane] = symbols + lane;
      if (is_fine(model)) {
        decode_static<true>(readers, lanes, slot, count, longer, precision, outs, lanes);
      } else {
        decode_static<false>(readers, lanes, slot, count, longer, precision, outs, lanes);
      }
      return;
    }
    for (int64_t lane = 0; lane < lanes && result->fault == CoderFault::kNone; ++lane) {
      const int64_t of_lane = count + (lane < longer);
      result->fault =
          precision > 16
              ? decode_rows<true>(readers[lane], rows, lane, lanes, of_lane, precision, symbols, &result->position)
              : decode_rows<false>(readers[lane], rows, lane, lanes, of_lane, precision, symbols, &result->position);
    }
  });
  if (!checked) check_symbols(params, stream, frame);
}

// Streams of one lane with one model for all: their steps are independent, so several run at once.
bool decode_streams_together(const DecodeParams& params, int64_t stream, const Slot& slot) {
  constexpr int kTogether = static_cast<int>(kStreamsAtOnce);
  Reader readers[kTogether];
  int64_t* outs[kTogether];
  for (int64_t s = 0; s < kStreamsAtOnce; ++s) {
    const Frame& frame = params.frames[stream + s];
    if (frame.lanes != 1) return false;
    bool fits = false;
    with_rows(params.model, stream + s, slot,
              [&](const auto& rows) { fits = model_fits(params, stream + s, frame, slot, rows, true); });
    if (!fits) return false;
    open_lanes(params.data + params.offsets[stream + s], frame, readers + s);
    outs[s] = params.symbols + (stream + s) * params.length;
  }
  const int precision = params.model.precision;
  if (params.length > 0) prepare_buckets(slot, params.model);
  if (is_fine(params.model)) {
    decode_together<true, kTogether>(readers, slot, params.length, precision, outs, 1);
  } else {
    decode_together<false, kTogether>(readers, slot, params.length, precision, outs, 1);
  }
  for (int64_t s = 0; s < kStreamsAtOnce; ++s) check_symbols(params, stream + s, params.frames[stream + s]);
  return true;
}

void decode_streams(const DecodeParams& params, int64_t stream, int64_t streams, void* scratch) {
  const Slot slot = slot_of(scratch, params.model.symbols);
  const bool shared = params.model.position_stride == 0 && params.model.stream_stride == 0;
  if (streams == kStreamsAtOnce && shared && decode_streams_together(params, stream, slot)) return;
  for (int64_t s = 0; s < streams; ++s) {
    params.results[stream + s].fault = CoderFault::kNone;
    decode_stream(params, stream + s, slot);
  }
}

void open_stream(const DecodeParams& params, int64_t stream) {
  const int64_t begin = params.offsets[stream];
  Frame& frame = params.frames[stream];
  frame = read_frame(params.data + begin, params.offsets[stream + 1] - begin, add_bytes, params.results + stream);
  if (params.results[stream].fault == CoderFault::kNone && (frame.kind != kRowsKind) != params.adaptive) {
    params.results[stream].fault = CoderFault::kKind;
    params.results[stream].value = frame.kind;
  }
}
