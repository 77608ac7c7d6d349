// SPDX-License-Identifier: Apache-2.0
// The coder for every machine: plain loops over rows, and the CRC from tables.
#define PYCORE_LANES 1
#include "kernels.h"

namespace pycore::scalar {
#include "kernels.inl.h"
}  // namespace pycore::scalar
