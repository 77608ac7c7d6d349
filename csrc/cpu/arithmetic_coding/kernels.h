// SPDX-License-Identifier: Apache-2.0
// What dispatch.cpp asks of an instruction set: some streams, or some rows, at a time. All of them give the
// same bytes.
#pragma once

#include <pycore/arithmetic_coding/arithmetic_coding.h>
#include <pycore/arithmetic_coding/crc_run.h>
#include <pycore/arithmetic_coding/frame.h>
#include <pycore/arithmetic_coding/table.h>
#include <pycore/dtype.h>

#include <cstdint>

namespace pycore {

// Streams that a decoder takes at once when one model serves them all: the steps of one stream wait for each other,
// those of several do not.
inline constexpr int64_t kStreamsAtOnce = 4;

struct CoderKernels {
  void (*quantize)(const QuantizeParams& params, int64_t row, void* scratch);
  void (*encode)(const EncodeParams& params, int64_t stream, void* scratch);
  void (*open)(const DecodeParams& params, int64_t stream);
  void (*decode)(const DecodeParams& params, int64_t stream, int64_t streams, void* scratch);
  void (*probe)(const DecodeParams& params, int64_t stream, void* scratch);
  void (*encode_bytes)(const EncodeParams& params, int64_t stream, void* scratch);
  void (*decode_bytes)(const DecodeParams& params, int64_t stream, void* scratch);
  uint32_t (*crc)(uint32_t crc, const uint8_t* data, int64_t bytes);
  int64_t* (*put_tokens)(const uint32_t* walked, int64_t count, int64_t* out);
};

// A slot's scratch: the header and, of each kind, room for a row of the model.
struct CoderSlot {
  const void* prepared;  // the row that `row` and `buckets` hold, or null
  uint64_t fingerprint;
  CoderFault fault;
  bool has_buckets, has_shares;  // tables of the prepared row
};
inline constexpr int64_t kSlotHeader = 64, kBucketBytes = 4 * 4096 + 64;  // 2^12 symbols of 32 bits, or 2^13 of 16
inline constexpr int64_t kShareStretches = 4096, kShareBytes = 3 * 2 * kShareStretches;

inline int64_t slot_row_bytes(int64_t symbols) { return (symbols + 1 + 16) * 4 / 64 * 64 + 64; }
inline int64_t coder_slot_bytes(int64_t symbols) {
  return kSlotHeader + kBucketBytes + kShareBytes + 4 * slot_row_bytes(symbols);
}

// Entries of 16 bits and a count of uses for each context: 17 of them, or 17 after each byte.
inline int64_t adaptive_contexts(int order) { return order == 1 ? 256 * 17 : 17; }
inline int64_t adaptive_slot_bytes(int order) { return (adaptive_contexts(order) * 33 + 127) / 64 * 64; }

namespace scalar {
extern const CoderKernels coder;
}
namespace avx2 {
extern const CoderKernels coder;
}
namespace avx512 {
extern const CoderKernels coder;
}

}  // namespace pycore
