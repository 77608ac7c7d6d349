// SPDX-License-Identifier: Apache-2.0
// Choosing among the tables of functions of a family, one for each instruction set: once a call, never in a loop.
#pragma once

#include <pycore/cpu_isa.h>

namespace pycore {

template <class Table>
const Table& for_isa(CpuIsa isa, const Table& scalar, const Table& avx2, const Table& avx512) {
  switch (isa) {
    case CpuIsa::kAvx512: return avx512;
    case CpuIsa::kAvx2: return avx2;
    case CpuIsa::kScalar: break;
  }
  return scalar;
}

}  // namespace pycore
