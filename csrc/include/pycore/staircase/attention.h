// SPDX-License-Identifier: Apache-2.0
// Attention on a staircase cache: keys and values stay packed. The problem is an AttentionParams without key and value
// (attention/attention.h) whose `planes` points here; its query is float32, and all queries of a batch row stand in one
// step of the ladder, so that they read every token at one width.
//
// A tile of 64 keys at one width of b bits is, with code c of token t and channel d counted from the middle, 2^(b - 1),
// middle_d + c step_d with middle_d = lo_d + (2^(b - 1) + centre_d) step_d. So
//   score(m, t) = sum_d (q_md step_d) c_dt  +  sum_d q_md middle_d
//   out(m, d)  += sum_t (w_mt step_t) c_td  +  sum_t w_mt middle_t      (middle, step of t's group of d)
// Every first sum is one chain of FMAs, channels or kept tokens ascending; every second one is sixteen lanes (channel
// d, or token t, in lane d mod 16), then halved, and added to the chain when it is done. The chain of a value starts
// from what earlier tiles of the segment gave. Tokens in full precision (sinks, and what the ladder gives 16 bits) are
// read as attention reads rows of their dtype.
#pragma once

#include <pycore/staircase/cache.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

struct StaircasePlanes {
  DType dtype = DType::kFloat32;  // of full, lo and hi
  int64_t kv_heads = 0;
  int64_t sinks = 0, step = 0;  // and groups of 64: those of keys are the tiles of attention
  StaircaseSide key, value;
};

inline constexpr int64_t kPackedGroup = 64;

}  // namespace pycore
