// SPDX-License-Identifier: Apache-2.0
// One function per op family, defined in csrc/python/<stem>.cpp and called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace pycore::python {

void register_arithmetic_coding(pybind11::module_& m);
void register_arithmetic_coding_streaming(pybind11::module_& m);
void register_arithmetic_coding_table(pybind11::module_& m);
void register_arithmetic_coding_windows(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_attention_blocks(pybind11::module_& m);
void register_attention_cache(pybind11::module_& m);
void register_linear(pybind11::module_& m);
void register_linear_pointwise(pybind11::module_& m);
void register_ngram(pybind11::module_& m);
void register_staircase(pybind11::module_& m);
void register_staircase_attention(pybind11::module_& m);
void register_staircase_cache(pybind11::module_& m);
void register_pairwise(pybind11::module_& m);
void register_vq(pybind11::module_& m);

}  // namespace pycore::python
