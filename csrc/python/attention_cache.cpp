// SPDX-License-Identifier: Apache-2.0
// pycore.native.lambda_cache_append, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../host/attention_cache_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

void append(py::object key_cache, py::object value_cache, py::object lengths, py::object key, py::object value,
            py::object starts, py::object sink_size, py::object most, py::object threads, py::object stream_address) {
  constexpr const char* kOp = "lambda_cache_append";
  const int64_t stream = integer(stream_address, kOp, "stream");
  const Array written[] = {output(key_cache, kOp, "key_cache", stream), output(value_cache, kOp, "value_cache", stream),
                           output(lengths, kOp, "lengths", stream)};
  const Array read[] = {input(key, kOp, "key", stream), input(value, kOp, "value", stream),
                        optional_input(starts, kOp, "starts", stream)};
  CacheAppendArgs args;
  args.key_cache = written[0].view;
  args.value_cache = written[1].view;
  args.lengths = written[2].view;
  args.key = read[0].view;
  args.value = read[1].view;
  args.starts = read[2].view;
  args.sink_size = integer(sink_size, kOp, "sink_size");
  args.most = integer(most, kOp, "most");
  const CacheAppendParams params = cache_append_params(args);
  const Parallel parallel = thread_parallel(threads, kOp);
  const py::gil_scoped_release release;
  if (args.key.device == Device::kCuda) {
    throw_if(launch_lambda_cache_append(params, reinterpret_cast<void*>(stream)), kOp);
  } else {
    throw_if(lambda_cache_append(params, parallel), kOp);
  }
}

constexpr const char* kDoc = R"(Writes new tokens into an evicting cache, in place.

key_cache [B, Hkv, sink_size + ring, D] and value_cache [B, Hkv, sink_size + ring, Dv], contiguous, ring a multiple of 64: the
token at position j goes to row j if j < sink_size and to row sink_size + j % ring otherwise. key [B, Hkv, n, D], value
[B, Hkv, n, Dv]; starts int64 [B]: so many tokens at the front are padding and left out. lengths int64 [B]: tokens seen, moved
on. key_cache [B, Hkv, tiles, D, 64] keeps keys by channel, on the CPU, and sink_size is then a multiple of 64, the rows
that stay. With most >= 0 no token is written over: a row of the batch may have that many, and more are refused.
`attention` with key_ring=ring and key_lengths=lengths reads such a cache.)";

}  // namespace

void register_attention_cache(py::module_& m) {
  m.def("lambda_cache_append", &append, kDoc, py::arg("key_cache"), py::arg("value_cache"), py::arg("lengths"),
        py::arg("key"), py::arg("value"), py::arg("starts") = py::none(), py::kw_only(), py::arg("sink_size"),
        py::arg("most") = -1, py::arg("threads") = py::none(), py::arg("stream") = 0);
}

}  // namespace pycore::python
