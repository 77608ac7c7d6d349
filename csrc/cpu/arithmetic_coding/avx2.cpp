// SPDX-License-Identifier: Apache-2.0
// The coder on AVX2. Nothing is included inside the target region but code without linkage.
#include <immintrin.h>
#include <pycore/arithmetic_coding/crc_run.h>
#include <pycore/arithmetic_coding/frame.h>
#include <pycore/arithmetic_coding/table.h>
#include <pycore/dtype.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,sse4.2")

namespace pycore::avx2 {
namespace {
#include "crc_avx2.h"
#include "nibbles_avx2.h"
#include "vectors_avx2.h"
//
#include "rows.inl.h"
//
#include "decode.inl.h"
#include "encode.inl.h"
//
#include "adaptive.inl.h"
//
#include "claims.inl.h"
}  // namespace

const CoderKernels coder = {quantize_row, encode_stream, open_stream, decode_streams, probe_stream,
                            encode_bytes, decode_bytes,  add_bytes,   put_tokens};

}  // namespace pycore::avx2

#pragma GCC pop_options
