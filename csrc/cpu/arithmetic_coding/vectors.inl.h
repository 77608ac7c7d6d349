// SPDX-License-Identifier: Apache-2.0
// What the coder does to whole rows, of the instruction set that PYCORE_LANES stands for (../simd.inl.h says why).
#pragma once

#if PYCORE_LANES == 16
#include "crc_avx2.h"
#include "nibbles_avx2.h"
#include "vectors_avx512.h"
#elif PYCORE_LANES == 8
#include "crc_avx2.h"
#include "nibbles_avx2.h"
#include "vectors_avx2.h"
#elif PYCORE_LANES == 1
#include "vectors_scalar.h"
#else
#error "PYCORE_LANES must be 1, 8 or 16"
#endif
