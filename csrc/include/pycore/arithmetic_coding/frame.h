// SPDX-License-Identifier: Apache-2.0
// The 32 bytes before a payload, little-endian:
//   0  magic 0xAC                      12  fingerprint of the first row, or model_id (8 bytes)
//   1  version                         20  number of symbols (6 bytes)
//   2  kind, + 0x80 with a model_id    26  bytes of payload (6 bytes)
//   3  lanes
//   4  CRC-32C of all bytes but these four
//   8  CRC-32C of the symbols, each as four bytes
#pragma once

#include <pycore/arithmetic_coding/arithmetic_coding.h>
#include <pycore/arithmetic_coding/coder_math.h>

#include <cstdint>
#include <cstring>

namespace pycore {

inline constexpr int64_t kFrameBytes = 32;
inline constexpr int64_t kCrcOffset = 4, kCrcEnd = 8;
inline constexpr int64_t kMostSymbols = (int64_t{1} << 48) - 1;
inline constexpr uint8_t kMagic = 0xac, kFormatVersion = 1, kModelIdFlag = 0x80;

enum StreamKind : uint8_t { kRowsKind = 0, kBytesOrder0 = 1, kBytesOrder1 = 2 };

PYCORE_CODER void put_bytes(uint8_t* out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(value >> 8 * i);
}

PYCORE_CODER uint64_t get_bytes(const uint8_t* in, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(in[i]) << 8 * i;
  return value;
}

// All but the CRC of the bytes, which comes last: frame_crc() goes over the finished stream.
PYCORE_CODER void write_frame(uint8_t* out, const Frame& frame) {
  out[0] = kMagic;
  out[1] = kFormatVersion;
  out[2] = static_cast<uint8_t>(frame.kind | (frame.has_id ? kModelIdFlag : 0));
  out[3] = static_cast<uint8_t>(frame.lanes);
  put_bytes(out + 8, frame.symbols_crc, 4);
  put_bytes(out + 12, frame.model, 8);
  put_bytes(out + 20, static_cast<uint64_t>(frame.count), 6);
  put_bytes(out + 26, static_cast<uint64_t>(frame.payload), 6);
}

// `add(crc, data, bytes)` adds bytes to a CRC-32C.
template <class Add>
PYCORE_CODER uint32_t frame_crc(const uint8_t* stream, int64_t bytes, const Add& add) {
  uint32_t crc = add(~0u, stream, kCrcOffset);
  return ~add(crc, stream + kCrcEnd, bytes - kCrcEnd);
}

// Reads and checks a whole stream; *result gets a fault, or the count.
template <class Add>
PYCORE_CODER Frame read_frame(const uint8_t* stream, int64_t bytes, const Add& add, StreamResult* result) {
  Frame frame;
  *result = StreamResult();
  result->bytes = bytes;
  if (bytes >= 1 && stream[0] != kMagic) {
    result->fault = CoderFault::kForeign;
    return frame;
  }
  if (bytes < kFrameBytes) {
    result->fault = CoderFault::kTruncated;
    return frame;
  }
  frame.kind = stream[2] & 0x7f;
  frame.has_id = (stream[2] & kModelIdFlag) != 0;
  frame.lanes = stream[3];
  frame.crc = static_cast<uint32_t>(get_bytes(stream + kCrcOffset, 4));
  frame.symbols_crc = static_cast<uint32_t>(get_bytes(stream + 8, 4));
  frame.model = get_bytes(stream + 12, 8);
  frame.count = static_cast<int64_t>(get_bytes(stream + 20, 6));
  frame.payload = static_cast<int64_t>(get_bytes(stream + 26, 6));
  result->count = frame.count;
  if (stream[1] != kFormatVersion) {
    result->fault = CoderFault::kVersion;
    result->value = stream[1];
  } else if (bytes - kFrameBytes < frame.payload) {
    result->fault = CoderFault::kTruncated;
  } else if (bytes - kFrameBytes > frame.payload) {
    result->fault = CoderFault::kExtended;
  } else if (frame_crc(stream, bytes, add) != frame.crc) {
    result->fault = CoderFault::kDamaged;
  } else if (frame.kind > kBytesOrder1 || frame.lanes < 1 || frame.lanes > kMaxLanes) {
    result->fault = CoderFault::kForeign;
  }
  return frame;
}

}  // namespace pycore
