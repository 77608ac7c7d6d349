// SPDX-License-Identifier: Apache-2.0
// Vec with PYCORE_LANES lanes, which the sources of a family define (the compiler's own macros for an
// instruction set are not there when something preprocesses a source by itself, as ccache does).
//
// Every *.inl.h is included inside an anonymous namespace of a target region, and names what it includes of the library
// and of include/pycore too; the region's .cpp must have included that before it, and tests/test_packaging.py sees to
// it.
#pragma once

#if PYCORE_LANES == 16
#include "simd_avx512.h"
#elif PYCORE_LANES == 8
#include "simd_avx2.h"
#elif PYCORE_LANES == 1
#include "simd_plain.h"
#else
#error "PYCORE_LANES must be 1, 8 or 16"
#endif
