// SPDX-License-Identifier: Apache-2.0
// Argument errors, for the two faces only (kernels never throw). Every message is one sentence that names the op,
// the argument, what it was and what it must be:  "lambda_attention: key has 3 heads, which ..."
#pragma once

#include <pycore/tensor_view.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace pycore {

namespace detail {
template <class... Parts>
std::string sentence(const std::string& op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  return text.str();
}
}  // namespace detail

// ValueError in Python.
template <class... Parts>
void check_value(bool condition, const std::string& op, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(detail::sentence(op, parts...));
}

// IndexError in Python.
template <class... Parts>
void check_index(bool condition, const std::string& op, const Parts&... parts) {
  if (!condition) throw std::out_of_range(detail::sentence(op, parts...));
}

inline std::string shape_text(const TensorView& view) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < view.dims; ++i) text << (i ? ", " : "") << view.shape[i];
  text << ']';
  return text.str();
}

}  // namespace pycore
