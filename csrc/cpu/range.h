// SPDX-License-Identifier: Apache-2.0
// Rows, columns or codes begin .. end - 1.
#pragma once

#include <cstdint>

namespace pycore {

struct Range {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

}  // namespace pycore
