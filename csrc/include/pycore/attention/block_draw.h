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

#include <cmath>
#include <cstdint>
#include <cstring>

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

// The natural logarithm of a positive, normal x, within two units in the last place: x = 2^e m with m in
// [sqrt 1/2, sqrt 2], and log m = 2 (s + s^3 / 3 + s^5 / 5 + ...) for s = (m - 1) / (m + 1), |s| < 0.1716. The C
// library's may differ from machine to machine, and a device has another one.
PYCORE_HOST_DEVICE inline double block_log(double x) {
  uint64_t word;
  memcpy(&word, &x, sizeof(word));
  // The exponent of x / sqrt(1/2), rounded down: 0x3FE6A09E667F3BCD is sqrt(1/2).
  const int64_t e = static_cast<int64_t>(word - 0x3FE6A09E667F3BCDu) >> 52;
  word -= static_cast<uint64_t>(e) << 52;
  double m;
  memcpy(&m, &word, sizeof(m));
  const double s = (m - 1) / (m + 1), z = s * s;
  double sum = 0;
  for (int n = 23; n >= 3; n -= 2) sum = (sum + 1.0 / n) * z;
  const double low = s * sum, scale = static_cast<double>(e);
  // log 2 in two parts, the first with zeros enough for an exact product.
  return scale * 0x1.62e42fefap-1 + (2 * s + (2 * low + scale * 0x1.cf79abc9e3b3ap-40));
}

// What importance correction adds to the logits of blocks drawn with probability p.
PYCORE_HOST_DEVICE inline double added_logit(double p) { return p < 0x1p-1000 ? 0.0 : -block_log(p); }

// log p plus Gumbel noise from 24 bits: the blocks with the k largest are k draws without replacement.
PYCORE_HOST_DEVICE inline double gumbel_score(double p, uint32_t bits) {
  const double u = (bits + 0.5) * (1.0 / 16777216.0);
  return block_log(p) - block_log(-block_log(u));
}

}  // namespace pycore
