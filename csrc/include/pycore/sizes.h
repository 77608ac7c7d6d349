// SPDX-License-Identifier: Apache-2.0
// Sizes that are products of what callers gave. An expanded tensor may have 2^60 rows and a keyword any number, so what
// no int64 holds becomes INT64_MAX, which no allocator gives.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace pycore {

// Of factors that are not negative.
inline int64_t size_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  bool over = false;
  for (const int64_t factor : factors) {
    if (factor == 0) return 0;
    over = over || __builtin_mul_overflow(product, factor, &product);
  }
  return over ? INT64_MAX : product;
}

inline int64_t size_sum(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

}  // namespace pycore
