// SPDX-License-Identifier: Apache-2.0
// The coder for every machine: plain loops over rows, and the CRC from tables.
#include <pycore/arithmetic_coding/crc_run.h>
#include <pycore/arithmetic_coding/frame.h>
#include <pycore/arithmetic_coding/table.h>
#include <pycore/dtype.h>

#include "kernels.h"

namespace pycore::scalar {
namespace {
#include "vectors_scalar.h"
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

}  // namespace pycore::scalar
