// SPDX-License-Identifier: Apache-2.0
// Whether a stream holds what its frame claims, found out without room for it: 32 bytes may claim 2^48 symbols.
//
// Zeros at a payload's end are not written, so a short payload may truly hold many symbols: once it has ended and the
// code is 0, every symbol that follows is the first one with a share, and the CRC of such a run has a closed form. A
// code that is not 0 has to come to an end: the encoder rounds up within its last interval, so of the bits behind the
// payload it would have had to write every one, but for those that happen to be zero.
#pragma once

#include <pycore/arithmetic_coding/crc_run.h>
#include <pycore/arithmetic_coding/frame.h>

#include <cstdint>

#include "adaptive.inl.h"
#include "decode.inl.h"

constexpr int64_t kProbed = 4096;      // symbols decoded at once, into memory of its own
constexpr int64_t kBitsPastEnd = 256;  // 64 are still in the code when the payload ends; no stream needs the others
constexpr int64_t kFreeSymbols = 1 << 17, kFreeSymbolsPerByte = 64;  // claims as large are decoded without a look
constexpr int64_t kFreeBytes = 1 << 20, kFreeBytesPerByte = 256;

inline bool ended(const Reader& reader) { return reader.next == reader.end; }

// Fixed row, any number of lanes.
void probe_rows(const DecodeParams& params, int64_t stream, const Slot& slot) {
  const CoderModel& model = params.model;
  const Frame& frame = params.frames[stream];
  StreamResult* result = params.results + stream;
  bool fits = false;
  with_rows(model, stream, slot, [&](const auto& rows) { fits = model_fits(params, stream, frame, slot, rows, true); });
  if (!fits) return;
  Reader readers[kMaxLanes];
  if (!open_lanes(params.data + params.offsets[stream], frame, readers)) {
    result->fault = CoderFault::kForeign;
    return;
  }
  prepare_buckets(slot, model);
  const int64_t lanes = frame.lanes, total = int64_t{1} << model.precision, limit = kBitsPastEnd << model.precision;
  int64_t block[kProbed], spent[kMaxLanes] = {};  // past the end: at least so many bits, times 2^precision
  uint32_t crc = ~0u;
  int64_t first = 0;
  while (slot.row[first + 1] == 0) ++first;
  if (slot.row[first + 1] == total) {  // no other symbol has a share: it takes no bits, and its number is free
    if (~crc32c_run(crc, static_cast<uint32_t>(first), params.length) != frame.symbols_crc) {
      result->fault = CoderFault::kSymbols;
    }
    return;
  }
  for (int64_t done = 0; done < params.length;) {
    bool run = true;
    for (int64_t l = 0; l < lanes; ++l) {
      const bool zero = ended(readers[l]) && readers[l].coder.code == 0;
      run = run && zero;
      if (!zero && spent[l] > limit) {
        result->fault = CoderFault::kClaim;
        result->value = params.length;
        return;
      }
    }
    if (run) {
      crc = crc32c_run(crc, static_cast<uint32_t>(first), params.length - done);
      break;
    }
    const int64_t left = params.length - done, most = kProbed / lanes * lanes, count = left < most ? left : most;
    int64_t* outs[kMaxLanes];
    bool at_end[kMaxLanes];
    for (int64_t l = 0; l < lanes; ++l) {
      outs[l] = block + l;
      at_end[l] = ended(readers[l]);
    }
    if (is_fine(model)) {
      decode_static<true>(readers, lanes, slot, count / lanes, count % lanes, model.precision, outs, lanes);
    } else {
      decode_static<false>(readers, lanes, slot, count / lanes, count % lanes, model.precision, outs, lanes);
    }
    crc = add_symbols(crc, block, count);
    for (int64_t i = 0; i < count; ++i) {
      // -log2(width / total) >= (total - width) / total
      if (at_end[i % lanes]) spent[i % lanes] += total - (slot.row[block[i] + 1] - slot.row[block[i]]);
    }
    done += count;
  }
  if (~crc != frame.symbols_crc) result->fault = CoderFault::kSymbols;
}

void probe_bytes(const DecodeParams& params, int64_t stream, void* scratch) {
  const Frame& frame = params.frames[stream];
  StreamResult* result = params.results + stream;
  AdaptiveDecoder decoder;
  if (!open_adaptive(params, stream, scratch, &decoder)) return;
  uint32_t crc = ~0u;
  int64_t spent = 0;
  for (int64_t i = 0; i < params.length; ++i) {
    if (ended(decoder.reader)) {
      if (decoder.reader.coder.code == 0) {
        crc = crc32c_run(crc, 0, params.length - i);
        break;
      }
      if (spent > kBitsPastEnd << kAdaptivePrecision) {
        result->fault = CoderFault::kClaim;
        result->value = params.length;
        return;
      }
      crc = crc_four(crc, decoder.take(&spent));
    } else {
      int64_t inside = 0;
      crc = crc_four(crc, decoder.take(&inside));
    }
  }
  if (~crc != frame.symbols_crc) result->fault = CoderFault::kSymbols;
}

// Only where the claim is large beside the payload, and nothing else bounds it: rows for each position are as many as
// there are symbols, and the caller's.
void probe_stream(const DecodeParams& params, int64_t stream, void* scratch) {
  const int64_t payload = params.frames[stream].payload;
  if (params.adaptive) {
    if (params.length > kFreeBytes + kFreeBytesPerByte * payload) probe_bytes(params, stream, scratch);
  } else if (params.model.position_stride == 0 && params.length > kFreeSymbols + kFreeSymbolsPerByte * payload) {
    probe_rows(params, stream, slot_of(scratch, params.model.symbols));
  }
}
