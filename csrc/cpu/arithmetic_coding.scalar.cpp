// SPDX-License-Identifier: Apache-2.0
// The coder for every machine: plain loops over rows, and the CRC from tables.
#include <pycore/arithmetic_coding_frame.h>
#include <pycore/arithmetic_coding_table.h>
#include <pycore/crc_run.h>
#include <pycore/dtype.h>

#include "arithmetic_coding_kernels.h"

namespace pycore::scalar {
namespace {
#include "coder_scalar.h"
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

}  // namespace pycore::scalar
