// SPDX-License-Identifier: Apache-2.0
// Where a row of a view begins, in bytes, for rows of any dtype.
#pragma once

#include <pycore/dtype.h>
#include <pycore/row_view.h>

#include <cstdint>

#include "../vector_rows.inl.h"

template <DType kType>
PYCORE_INLINE const char* row_bytes(const RowView& view, int64_t row) {
  return static_cast<const char*>(view.data) + view.offset(row) * kElementBytes<kType>;
}
