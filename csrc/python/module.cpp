// SPDX-License-Identifier: Apache-2.0
// pycore.native: the kernels without torch, and what the build and the machine are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pycore/cpu_isa.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace pycore::python {
namespace {

std::string cpu_isa_in_use() {
  if (const char* error = cpu_isa_error()) throw std::invalid_argument(error);
  return cpu_isa_name(cpu_isa());
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (CpuIsa isa : {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa <= cpu_isa_available()) names.emplace_back(cpu_isa_name(isa));
  }
  return names;
}

void set_cpu_isa_by_name(const std::string& name) {
  CpuIsa isa;
  if (!parse_cpu_isa(name.c_str(), &isa)) {
    throw std::invalid_argument("set_cpu_isa: name is '" + name + "' and must be scalar, avx2 or avx512");
  }
  if (!set_cpu_isa(isa)) {
    throw std::invalid_argument("set_cpu_isa: name is '" + name + "', but this machine has " +
                                cpu_isa_name(cpu_isa_available()) + " at most");
  }
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + "." +
                     std::to_string(__GNUC_PATCHLEVEL__);
  info["python"] = PY_VERSION;
#ifdef PYCORE_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

// pybind11 makes an ImportError of whatever its initialisation throws. An instruction set that cannot be had is a wrong
// value, and raised before there is a function to call: the module's own entry point is the one below.
#define PyInit_native init_native
PYBIND11_MODULE(native, m) {
  m.doc() = "pycore's kernels for NumPy arrays and DLPack tensors, without torch.";
  m.def("cpu_isa", &cpu_isa_in_use, "The instruction set the CPU kernels use: 'scalar', 'avx2' or 'avx512'.");
  m.def("set_cpu_isa", &set_cpu_isa_by_name, py::arg("name"),
        "Lowers (or restores) the instruction set for this process; ValueError if the machine does not have it.");
  m.def("available_isas", &available_isas, "The instruction sets this machine can run, slowest first.");
  m.def("build_info", &build_info, "What this library was compiled with; pycore.build_info() says more.");
  register_arithmetic_coding(m);
  register_arithmetic_coding_streaming(m);
  register_arithmetic_coding_table(m);
  register_arithmetic_coding_windows(m);
  register_attention(m);
  register_attention_blocks(m);
  register_attention_cache(m);
  register_linear(m);
  register_linear_pointwise(m);
  register_ngram(m);
  register_staircase(m);
  register_staircase_attention(m);
  register_staircase_cache(m);
  register_pairwise(m);
  register_vq(m);
}
#undef PyInit_native

}  // namespace pycore::python

extern "C" PYBIND11_EXPORT PyObject* PyInit_native() {
  if (const char* error = pycore::cpu_isa_error()) {
    PyErr_SetString(PyExc_ValueError, error);
    return nullptr;
  }
  return pycore::python::init_native();
}
