// SPDX-License-Identifier: Apache-2.0
// The coder on the CPU: picks the instruction set and hands streams, or rows, to threads.
#include <pycore/arithmetic_coding/arithmetic_coding.h>
#include <pycore/arithmetic_coding/frame.h>
#include <pycore/cpu_isa.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cstring>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore {
namespace {

const CoderKernels& kernels_for(CpuIsa isa) { return for_isa(isa, scalar::coder, avx2::coder, avx512::coder); }

constexpr int64_t kSerialSymbols = 1 << 12;  // symbols, or entries of rows, that are not worth waking a thread for

Parallel limited(const Parallel& parallel, int64_t work) { return work < kSerialSymbols ? Parallel{} : parallel; }

// Slots start without a prepared row.
char* cleared(void* scratch, int64_t slot_bytes, int64_t threads) {
  char* slots = static_cast<char*>(scratch);
  for (int64_t slot = 0; slot < threads; ++slot) std::memset(slots + slot * slot_bytes, 0, sizeof(CoderSlot));
  return slots;
}

}  // namespace

int64_t quantize_cdf_scratch(const QuantizeParams& params, int64_t threads) {
  return size_product({threads, coder_slot_bytes(params.symbols)});
}

Status quantize_cdf(const QuantizeParams& params, const Parallel& parallel, void* scratch) {
  const int64_t rows = params.values.rows, bytes = coder_slot_bytes(params.symbols);
  const int64_t height = std::max<int64_t>(1, kSerialSymbols / (params.symbols + 1));
  const CoderKernels& run = kernels_for(params.isa);
  for_each_item(limited(parallel, size_product({rows, params.symbols})), (rows + height - 1) / height,
                [&](int64_t slot, int64_t item) {
                  void* memory = static_cast<char*>(scratch) + slot * bytes;
                  const int64_t end = std::min(rows, (item + 1) * height);
                  for (int64_t row = item * height; row < end; ++row) run.quantize(params, row, memory);
                });
  return {};
}

// A symbol takes precision bits at most, and the step in which the range is cut into 2^precision units of at least 2^24
// loses less than 2^-23 of a bit. The rest is the frame, the lanes' lengths and last words, and the word beyond the end
// that is written before it is known whether it counts.
int64_t ac_encode_capacity(const EncodeParams& params) {
  const int64_t bits = params.length * (params.order == kNoOrder ? params.model.precision : 2 * kAdaptivePrecision);
  return (bits / 8 + params.length / 4096 + kFrameBytes + 16 * params.lanes + 64) / 64 * 64;
}

int64_t ac_encode_scratch(const EncodeParams& params, int64_t threads) {
  return size_product(
      {threads, params.order == kNoOrder ? coder_slot_bytes(params.model.symbols) : adaptive_slot_bytes(params.order)});
}

Status ac_encode(const EncodeParams& params, const Parallel& parallel, void* scratch) {
  const CoderKernels& run = kernels_for(params.isa);
  if (params.order != kNoOrder) {
    const int64_t bytes = adaptive_slot_bytes(params.order);
    for_each_item(limited(parallel, size_product({params.streams, params.length})), params.streams,
                  [&](int64_t slot, int64_t stream) {
                    run.encode_bytes(params, stream, static_cast<char*>(scratch) + slot * bytes);
                  });
    return {};
  }
  const int64_t bytes = coder_slot_bytes(params.model.symbols);
  char* slots = cleared(scratch, bytes, parallel.threads);
  for_each_item(limited(parallel, size_product({params.streams, params.length})), params.streams,
                [&](int64_t slot, int64_t stream) { run.encode(params, stream, slots + slot * bytes); });
  return {};
}

Status ac_pack_streams(const EncodeParams& params, const int64_t* offsets, uint8_t* data, const Parallel& parallel) {
  const int64_t capacity = ac_encode_capacity(params);
  for_each_item(limited(parallel, offsets[params.streams] / 16), params.streams, [&](int64_t, int64_t stream) {
    std::memcpy(data + offsets[stream], params.memory + stream * capacity,
                static_cast<size_t>(offsets[stream + 1] - offsets[stream]));
  });
  return {};
}

Status ac_open_streams(const DecodeParams& params, const Parallel& parallel) {
  const CoderKernels& run = kernels_for(params.isa);
  const int64_t bytes = params.streams ? params.offsets[params.streams] - params.offsets[0] : 0;
  for_each_item(limited(parallel, bytes / 16), params.streams,
                [&](int64_t, int64_t stream) { run.open(params, stream); });
  return {};
}

int64_t ac_decode_scratch(const DecodeParams& params, int64_t threads) {
  return size_product({threads, params.adaptive ? adaptive_slot_bytes(1) : coder_slot_bytes(params.model.symbols)});
}

Status ac_check_claims(const DecodeParams& params, const Parallel& parallel, void* scratch) {
  const CoderKernels& run = kernels_for(params.isa);
  const int64_t bytes = params.adaptive ? adaptive_slot_bytes(1) : coder_slot_bytes(params.model.symbols);
  char* slots = params.adaptive ? static_cast<char*>(scratch) : cleared(scratch, bytes, parallel.threads);
  for_each_item(limited(parallel, size_product({params.streams, params.length})), params.streams,
                [&](int64_t slot, int64_t stream) { run.probe(params, stream, slots + slot * bytes); });
  return {};
}

Status ac_decode(const DecodeParams& params, const Parallel& parallel, void* scratch) {
  const CoderKernels& run = kernels_for(params.isa);
  if (params.adaptive) {
    const int64_t bytes = adaptive_slot_bytes(1);
    for_each_item(limited(parallel, size_product({params.streams, params.length})), params.streams,
                  [&](int64_t slot, int64_t stream) {
                    run.decode_bytes(params, stream, static_cast<char*>(scratch) + slot * bytes);
                  });
    return {};
  }
  const int64_t bytes = coder_slot_bytes(params.model.symbols);
  char* slots = cleared(scratch, bytes, parallel.threads);
  // Fewer streams at once where that would leave threads without work.
  const int64_t height = std::clamp<int64_t>(params.streams / parallel.threads, 1, kStreamsAtOnce);
  for_each_item(limited(parallel, size_product({params.streams, params.length})),
                (params.streams + height - 1) / height, [&](int64_t slot, int64_t item) {
                  const int64_t first = item * height, count = std::min(height, params.streams - first);
                  run.decode(params, first, count, slots + slot * bytes);
                });
  return {};
}

}  // namespace pycore
