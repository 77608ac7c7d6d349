// SPDX-License-Identifier: Apache-2.0
// unpack_codes of the instruction set that PYCORE_LANES stands for (../simd.inl.h says why).
#pragma once

#include "../simd.inl.h"

#if PYCORE_LANES == 16
#include "unpack_avx512.h"
#else
#include "unpack_avx2.h"
#endif
