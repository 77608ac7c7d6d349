// SPDX-License-Identifier: Apache-2.0
// A str among an op's arguments. torch's own conversion to std::string (its stable headers, 2.10 to 2.13) copies the
// text to the heap and never frees the copy: tens of bytes a call, among them what keeps glibc from using a freed
// tensor's memory again.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pycore {

struct Text : std::string {
  using std::string::string;
};

}  // namespace pycore

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<pycore::Text> {
  static pycore::Text call(StableIValue value, uint64_t version, bool is_internal) {
    const StringHandle handle = ToImpl<StringHandle>::call(value, version, is_internal);
    size_t length = 0;
    const char* data = nullptr;
    const bool read = torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0;
    pycore::Text text = read ? pycore::Text(data, length) : pycore::Text();
    if (torch_delete_string(handle) != 0 || !read) throw std::runtime_error("pycore: a str argument cannot be read");
    return text;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
