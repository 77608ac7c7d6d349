// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run on.
#pragma once

#include <pycore/export.h>

namespace pycore {

enum class CpuIsa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// What this CPU and its operating system can run (cpuid and xgetbv).
PYCORE_API CpuIsa cpu_isa_available();

// What the kernels use: the best available, or what PYCORE_CPU_ISA or set_cpu_isa lowered it to.
PYCORE_API CpuIsa cpu_isa();

// Whether what is available is kAvx512 with AVX512_BF16, which multiplies pairs of bfloat16.
PYCORE_API bool cpu_has_bfloat16_products();

// Lowers the choice for this process. False, and nothing changed, if `isa` is more than is available.
PYCORE_API bool set_cpu_isa(CpuIsa isa);

PYCORE_API const char* cpu_isa_name(CpuIsa isa);

// True, with `isa` set, for "scalar", "avx2" or "avx512".
PYCORE_API bool parse_cpu_isa(const char* name, CpuIsa* isa);

// Null, or the sentence that says why PYCORE_CPU_ISA cannot be had (unknown, or more than this machine has). The
// kernels then use what is available; the faces raise it before anything runs.
PYCORE_API const char* cpu_isa_error();

}  // namespace pycore
