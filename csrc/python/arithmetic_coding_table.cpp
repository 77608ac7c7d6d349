// SPDX-License-Identifier: Apache-2.0
// pycore.native.{EqualInfoTrie, pack_equal_info}: what pycore.EqualInfoTable is made of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../host/arithmetic_coding_table_args.h"
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
    const AlignedScratch scratch(kEncode, fewest ? 5 * (bytes + 1) : kParseScratch);
    const auto run = fewest ? &table_encode_fewest : &table_encode_longest;
    throw_if(
        run(owner.table(), reinterpret_cast<uint8_t*>(text), bytes, tokens.view.as<int64_t>(), &count, scratch.data),
        kEncode);
  }
  tokens.object.attr("resize")(count, py::arg("refcheck") = false);
  return tokens.object;
}

// Memory that has just been allocated comes in large pages where the system has them: entering it in small ones takes
// longer than decoding into it. NumPy does the same with its arrays.
void prefer_large_pages(char* memory, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kLarge = 1 << 22;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint, which may go unheard
}

py::bytes decode(const TableOwner& owner, const py::object& tokens_object) {
  const Array array = input(tokens_object, kDecode, "tokens");
  const TensorView& view = array.view;
  check_on_cpu(kDecode, "tokens", view);
  check_value(view.dtype == DType::kInt64 && view.dims == 1, kDecode, "tokens is ", dtype_name(view.dtype), " ",
              shape_text(view), " and must be int64 [n]");
  check_contiguous(kDecode, "tokens", view);
  const int64_t* tokens = view.as<int64_t>();
  const int64_t count = view.shape[0];
  // One pass over the tokens writes the text and finds what is no token. Its size is guessed, and mended at the end.
  int64_t room = table_likely_bytes(owner.table(), tokens, count);
  room += count > kSampled ? room / 16 + 4 * kMostStringBytes : 0;
  PyObject* out = PyBytes_FromStringAndSize(nullptr, room);
  if (out == nullptr) throw py::error_already_set();
  prefer_large_pages(PyBytes_AS_STRING(out), room);
  int64_t done = 0, bytes = 0;
  for (;;) {
    uint8_t* text = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out));
    int64_t more = 0, wrote = 0;
    {
      const py::gil_scoped_release release;
      table_decode(owner.table(), tokens + done, count - done, text + bytes, room - bytes, &more, &wrote);
    }
    done += more;
    bytes += wrote;
    const bool stuck = done < count;
    const int64_t token = stuck ? tokens[done] : 0;
    if (token < 0 || token >= owner.table().count) {
      Py_DECREF(out);
      check_index(false, kDecode, "tokens[", done, "] is ", token, " and must be 0 to ", owner.table().count - 1);
    }
    const int64_t rest = stuck ? table_likely_bytes(owner.table(), tokens + done, count - done) : 0;
    const int64_t wanted = stuck ? std::max(room + room / 2, bytes + rest + rest / 16) + 4 * kMostStringBytes : bytes;
    if (wanted != room && _PyBytes_Resize(&out, wanted) != 0) throw py::error_already_set();  // which frees it
    room = wanted;
    if (!stuck) return py::reinterpret_steal<py::bytes>(out);
  }
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
