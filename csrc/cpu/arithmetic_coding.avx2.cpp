// SPDX-License-Identifier: Apache-2.0
// The coder on AVX2. Nothing is included inside the target region but code without linkage.
#include <immintrin.h>
#include <pycore/arithmetic_coding_frame.h>
#include <pycore/arithmetic_coding_table.h>
#include <pycore/crc_run.h>
#include <pycore/dtype.h>

#include "arithmetic_coding_kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,sse4.2")

namespace pycore::avx2 {
namespace {
#include "coder_avx2.h"
#include "coder_crc.h"
#include "coder_nibbles_avx2.h"
//
#include "arithmetic_coding_rows.inl.h"
//
#include "arithmetic_coding_decode.inl.h"
#include "arithmetic_coding_encode.inl.h"
//
#include "arithmetic_coding_adaptive.inl.h"
//
#include "arithmetic_coding_claims.inl.h"
}  // namespace

const CoderKernels coder = {quantize_row, encode_stream, open_stream, decode_streams, probe_stream,
                            encode_bytes, decode_bytes,  add_bytes,   put_tokens};

}  // namespace pycore::avx2

#pragma GCC pop_options
