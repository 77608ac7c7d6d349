// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels for any x86-64.
#define PYCORE_LANES 4  // of the baseline vectors
#include "kernels.h"

namespace pycore::scalar {
#include "kernels.inl.h"
}  // namespace pycore::scalar
