// SPDX-License-Identifier: Apache-2.0
// pycore.native.{EqualInfoTrie, pack_equal_info}: what pycore.EqualInfoTable is made of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pycore/arithmetic_coding_table_args.h>

#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "call.h"

namespace pycore::python {
namespace {

constexpr const char* kEncode = "EqualInfoTable.encode";
constexpr const char* kDecode = "EqualInfoTable.decode";

py::object encode(const TableOwner& owner, const py::bytes& data, bool fewest) {
  char* text = nullptr;
  py::ssize_t length = 0;
  if (PyBytes_AsStringAndSize(data.ptr(), &text, &length) != 0) throw py::error_already_set();
  const int64_t bytes = length;
  check_value(!fewest || bytes <= kMostParsed, kEncode, "data has ", bytes, " bytes and may have ", kMostParsed,
              " for the optimal parse");
  // Room for a token a byte, most of which is never touched, and then given back.
  const Array tokens = cpu_result(py::none(), DType::kInt64, {bytes}, kEncode, "tokens");
  int64_t count = 0;
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(fewest ? 5 * (bytes + 1) : kParseScratch);
    const auto run = fewest ? &encode_fewest : &encode_longest;
    throw_if(
        run(owner.table(), reinterpret_cast<uint8_t*>(text), bytes, tokens.view.as<int64_t>(), &count, scratch.data),
        kEncode);
  }
  tokens.object.attr("resize")(count, py::arg("refcheck") = false);
  return tokens.object;
}

py::bytes decode(const TableOwner& owner, const py::object& tokens_object) {
  const Array array = input(tokens_object, kDecode, "tokens");
  const TensorView& view = array.view;
  check_on_cpu(kDecode, "tokens", view);
  check_value(view.dtype == DType::kInt64 && view.dims == 1, kDecode, "tokens is ", dtype_name(view.dtype), " ",
              shape_text(view), " and must be int64 [n]");
  check_value(view.shape[0] <= 1 || view.strides[0] == 1, kDecode, "tokens must be contiguous");
  const int64_t* tokens = view.as<int64_t>();
  int64_t bad = 0, bytes = 0;
  {
    const py::gil_scoped_release release;
    bytes = decoded_bytes(owner.table(), tokens, view.shape[0], &bad);
  }
  check_index(bytes >= 0, kDecode, "tokens[", bad, "] is ", bytes < 0 ? tokens[bad] : 0, " and must be 0 to ",
              owner.table().count - 1);
  py::bytes out = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, bytes));
  if (!out) throw py::error_already_set();
  uint8_t* text = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  const py::gil_scoped_release release;
  throw_if(decode_tokens(owner.table(), tokens, view.shape[0], text, bytes), kDecode);
  return out;
}

py::bytes pack(const std::vector<std::string>& strings) { return pack_table("pack_equal_info", strings); }

py::list strings(const TableOwner& owner) {
  py::list out;
  for (int64_t i = 0; i < owner.table().count; ++i) out.append(py::bytes(owner.string(static_cast<size_t>(i))));
  return out;
}

}  // namespace

void register_arithmetic_coding_table(py::module_& m) {
  m.def("pack_equal_info", &pack,
        "The file of a table: see docs/formats.md. strings: 2^bits of them, the string of token i at place i.",
        py::arg("strings"));
  py::class_<TableOwner>(m, "EqualInfoTrie",
                         "A table that was read from its file: see pycore.EqualInfoTable. BitstreamError for a file "
                         "that is no table, or a damaged one.")
      .def(py::init([](const py::bytes& file) {
             return std::make_unique<TableOwner>("EqualInfoTable", static_cast<std::string>(file));
           }),
           py::arg("file"))
      .def("encode", &encode, "int64 [n]: the longest matches, or as few tokens as can be.", py::arg("data"),
           py::kw_only(), py::arg("fewest") = false)
      .def("decode", &decode, "The bytes of tokens, int64 [n]; IndexError for one that is none.", py::arg("tokens"))
      .def("strings", &strings, "The string of every token.")
      .def_property_readonly("bits", &TableOwner::bits)
      .def_property_readonly("trie_bytes", &TableOwner::trie_bytes);
}

}  // namespace pycore::python
