// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "adaptive.inl.h"
#include "claims.inl.h"
#include "decode.inl.h"
#include "encode.inl.h"
}  // namespace

const CoderKernels coder = {quantize_row, encode_stream, open_stream, decode_streams, probe_stream,
                            encode_bytes, decode_bytes,  add_bytes,   put_tokens};
