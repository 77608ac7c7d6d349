// SPDX-License-Identifier: Apache-2.0
// The random decisions behind the blocks schedule, once for every instruction set and device: integers, and float64
// operations that IEEE 754 rounds in one way only. A decision is a function of (seed, round, head, I, J) alone, never
// of the batch slot, the chunk or the thread.
//
// A query block I and a key block J <= I, D = I - J, draw 24 bits: word 0 of Philox4x32-10 under key (seed mod 2^32,
// seed >> 32) at counter (J, I, head, round), or (D, 2^32 - 1, head, round) for a whole diagonal, shifted right by 8.
#pragma once

#include <pycore/attention/tile_schedule.h>
#include <pycore/philox.h>
#include <pycore/portable_math.h>

#include <cmath>
#include <cstdint>

namespace pycore {

struct BlockDraw {
  uint64_t seed = 0;
  uint32_t head = 0, round = 0;
  bool diagonal = false;

  PYCORE_PHILOX uint32_t bits(int64_t query_block, int64_t key_block) const {
    const uint32_t first = static_cast<uint32_t>(diagonal ? query_block - key_block : key_block);
    const uint32_t second = diagonal ? 0xFFFFFFFFu : static_cast<uint32_t>(query_block);
    return philox({{first, second, head, round}}, seed).word[0] >> 8;
  }
};

// p in [0, 1] as a threshold for 24 bits: a block takes part where its bits are below it.
PYCORE_HOST_DEVICE inline uint32_t block_threshold(double p) { return static_cast<uint32_t>(ceil(p * 16777216.0)); }

// What importance correction adds to the logits of blocks drawn with probability p.
PYCORE_HOST_DEVICE inline double added_logit(double p) { return p < 0x1p-1000 ? 0.0 : -portable_log(p); }

// log p plus Gumbel noise from 24 bits: the blocks with the k largest are k draws without replacement.
PYCORE_HOST_DEVICE inline double gumbel_score(double p, uint32_t bits) {
  const double u = (bits + 0.5) * (1.0 / 16777216.0);
  return portable_log(p) - portable_log(-portable_log(u));
}

}  // namespace pycore
