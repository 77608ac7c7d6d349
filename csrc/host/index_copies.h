// SPDX-License-Identifier: Apache-2.0
// Copies of the small integer arrays that kernels follow into memory: lengths, offsets, boundaries, bitmaps, nodes.
// Another thread may write to the caller's arrays between a check and the kernel that relies on it, so what is checked
// is a copy, and the copy is what the kernel reads. For the two faces; kernels see pointers.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"

namespace pycore {

// Lives as long as the call. A copy of it starts empty: pointers belong to the one that gave them.
class IndexCopies {
 public:
  IndexCopies() {}
  IndexCopies(const IndexCopies&) {}
  IndexCopies& operator=(const IndexCopies&) = delete;

  // `count` numbers that lie `stride` apart.
  const int64_t* keep(const std::string& op, const int64_t* from, int64_t count, int64_t stride = 1) {
    int64_t* to = few_ + used_;
    if (count <= kFew - used_) {
      used_ += count;
    } else {
      many_.push_back(memory_for<int64_t>(op, "the copy of an array of indices", count));
      to = many_.back().data();
    }
    if (stride == 1) {
      if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(int64_t));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
    }
    return to;
  }

 private:
  static constexpr int64_t kFew = 24;  // that need no allocation
  int64_t few_[kFew];
  int64_t used_ = 0;
  std::vector<std::vector<int64_t>> many_;
};

}  // namespace pycore
