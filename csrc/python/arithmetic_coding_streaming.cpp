// SPDX-License-Identifier: Apache-2.0
// pycore.native.{ArithmeticEncoder, ArithmeticDecoder}: a stream a few symbols at a time.
#include "../host/arithmetic_coding_streaming.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "call.h"

namespace pycore::python {
namespace {

// An int, or an integer array of at most one dimension.
std::vector<int64_t> symbols_of(const py::object& symbols) {
  constexpr const char* kOp = StreamEncoder::kOp;
  // An int, Python's or NumPy's. What has a dtype and dimensions is an array, and read as one.
  if (PyLong_Check(symbols.ptr()) || (!py::hasattr(symbols, "__dlpack__") && PyIndex_Check(symbols.ptr()))) {
    if (is_bool(symbols)) {
      throw py::type_error(std::string(kOp) + ": symbols is a " + type_name(symbols) +
                           " and must be an int or integers");
    }
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(symbols.ptr()));
    if (!index) throw py::error_already_set();
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    check_index(overflow == 0, kOp, "symbols[0] is beyond every cdf");
    return {value};
  }
  const Array array = input(symbols, kOp, "symbols");
  const TensorView& view = array.view;
  check_on_cpu(kOp, "symbols", view);
  check_value(is_integer(view.dtype), kOp, "symbols has dtype ", dtype_name(view.dtype),
              " and must have an integer dtype");
  check_value(view.dims <= 1, kOp, "symbols has shape ", shape_text(view), " and must be an int or [length]");
  auto out = memory_for<int64_t>(kOp, "the copy of symbols", view.count());
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = integer_at(view, view.dims ? static_cast<int64_t>(i) * view.strides[0] : 0);
  }
  return out;
}

// Calls from several threads take turns; the GIL is not held while one waits or works.
struct Encoder {
  explicit Encoder(std::optional<int64_t> model_id) : stream(model_id) {}
  StreamEncoder stream;
  std::mutex mutex;
};

struct Decoder {
  Decoder(std::string data, std::optional<int64_t> model_id) : stream(std::move(data), model_id) {}
  StreamDecoder stream;
  std::mutex mutex;
};

py::object encode(py::object self, py::object symbols, py::object cdf) {
  Encoder& encoder = self.cast<Encoder&>();
  const std::vector<int64_t> values = symbols_of(symbols);
  const Array array = input(cdf, StreamEncoder::kOp, "cdf");
  {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(encoder.mutex);
    encoder.stream.encode(values, array.view);
  }
  return self;
}

py::bytes finish(Encoder& encoder) {
  std::string stream;
  {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(encoder.mutex);
    stream = encoder.stream.finish();
  }
  return py::bytes(stream);
}

py::object decode(Decoder& decoder, py::object cdf, py::object wanted) {
  const std::optional<int64_t> count = optional_integer(wanted, StreamDecoder::kOp, "count");
  const Array array = input(cdf, StreamDecoder::kOp, "cdf");
  std::vector<int64_t> symbols;
  {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(decoder.mutex);
    symbols = decoder.stream.decode(array.view, count);
  }
  if (!count && array.view.dims == 1) return py::int_(symbols[0]);
  const Array out =
      cpu_result(py::none(), DType::kInt64, {static_cast<int64_t>(symbols.size())}, StreamDecoder::kOp, "out");
  if (!symbols.empty()) std::memcpy(out.view.data, symbols.data(), symbols.size() * sizeof(int64_t));
  return out.object;
}

// A number of a stream that another thread may be working on.
template <class Coder, class Number>
int64_t guarded(Coder& coder, const Number& number) {
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(coder.mutex);
  return (coder.stream.*number)();
}

void check_finished(Decoder& decoder) {
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(decoder.mutex);
  decoder.stream.finish();
}

constexpr const char* kEncoderDoc = R"(Codes one stream, a few symbols at a time: what pycore.ops.ac_encode gives.

encode(symbols, cdf) takes an int or an integer array [n] on the CPU, and cumulative frequencies as quantize_cdf gives
them: int32 or uint16, [V + 1] for all of the symbols or [n, V + 1]. It returns the encoder. finish() returns the stream
and can be called once. A call that raises leaves the stream as it was. position is how many bits of the payload the
symbols so far have settled.

model_id: 0 to 2^63 - 1, kept in the stream in place of the fingerprint of its first row.

IndexError for a symbol that cdf does not have, ValueError for one that it gives no share and for what is no cumulative
distribution.)";

constexpr const char* kDecoderDoc =
    R"(Decodes a stream of one lane, a few symbols at a time, when the cdf depends on what came before.

decode(cdf) returns an int for a cdf [V + 1], an int64 array for a cdf [n, V + 1] or with count=n. finish() says whether
all symbols were decoded and were those that were coded; until then they are not to be trusted where the cdfs might
differ. A call that raises leaves the decoder as it was. position is how many bits of the payload the symbols so far
have taken: what the encoder's was after as many.

BitstreamError: on opening, for a stream that is damaged, truncated, extended or foreign; in decode(), for another model
or more symbols than there are; in finish(), for symbols that are left, or are not what was coded.)";

}  // namespace

void register_arithmetic_coding_streaming(py::module_& m) {
  const py::none none;
  py::class_<Encoder>(m, "ArithmeticEncoder", kEncoderDoc)
      .def(py::init([](const py::object& model_id) {
             return std::make_unique<Encoder>(optional_integer(model_id, StreamEncoder::kOp, "model_id"));
           }),
           py::kw_only(), py::arg("model_id") = none)
      .def("encode", &encode, "Codes symbols and returns the encoder.", py::arg("symbols"), py::arg("cdf"))
      .def("finish", &finish, "Ends the stream and returns it.")
      .def_property_readonly("position", [](Encoder& encoder) { return guarded(encoder, &StreamEncoder::position); })
      .def("__len__", [](Encoder& encoder) { return guarded(encoder, &StreamEncoder::count); });
  py::class_<Decoder>(m, "ArithmeticDecoder", kDecoderDoc)
      .def(py::init([](const py::bytes& data, const py::object& model_id) {
             return std::make_unique<Decoder>(static_cast<std::string>(data),
                                              optional_integer(model_id, StreamDecoder::kOp, "model_id"));
           }),
           py::arg("data"), py::kw_only(), py::arg("model_id") = none)
      .def("decode", &decode, "The next symbol, or the next `count`, or one for each row of cdf.", py::arg("cdf"),
           py::arg("count") = none)
      .def("finish", &check_finished, "BitstreamError unless all symbols were decoded and are those that were coded.")
      .def_property_readonly("position", [](Decoder& decoder) { return guarded(decoder, &StreamDecoder::position); })
      .def_property_readonly("remaining", [](Decoder& decoder) { return guarded(decoder, &StreamDecoder::remaining); })
      .def("__len__", [](Decoder& decoder) { return guarded(decoder, &StreamDecoder::count); });
}

}  // namespace pycore::python
