// SPDX-License-Identifier: Apache-2.0
// pycore.native.ngram_update, ngram_lookup and ngram_draft, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>

#include "../host/ngram_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"

namespace pycore::python {
namespace {

// The arrays of a table, which live as long as the call.
struct Table {
  Table(const char* op, const py::object& keys, const py::object& successors, const py::object& scores, bool written)
      : keys(array(keys, op, "keys", written)),
        successors(array(successors, op, "successors", written)),
        scores(array(scores, op, "scores", written)),
        args{this->keys.view, this->successors.view, this->scores.view} {}
  static Array array(const py::object& object, const char* op, const char* name, bool written) {
    return written ? output(object, op, name) : input(object, op, name);
  }
  Array keys, successors, scores;
  NgramTableArgs args;
};

py::object update(py::object keys, py::object successors, py::object scores, py::object trigrams, py::object weights) {
  constexpr const char* kOp = "ngram_update";
  const Table table(kOp, keys, successors, scores, true);
  const Array read[] = {input(trigrams, kOp, "trigrams"), input(weights, kOp, "weights")};
  IndexCopies copies;
  NgramUpdateParams params = ngram_update_params(table.args, read[0].view, read[1].view, &copies);
  const Array result = cpu_result(py::none(), DType::kInt64, {2}, kOp, "result");
  params.result = result.view.as<int64_t>();
  const py::gil_scoped_release release;
  throw_if(ngram_update(params), kOp);
  return result.object;
}

py::tuple lookup(py::object keys, py::object successors, py::object scores, py::object contexts) {
  constexpr const char* kOp = "ngram_lookup";
  const Table table(kOp, keys, successors, scores, false);
  const Array read = input(contexts, kOp, "contexts");
  IndexCopies copies;
  NgramLookupParams params = ngram_lookup_params(table.args, read.view, &copies);
  const Array found = cpu_result(py::none(), DType::kInt64, {params.rows, kNgramSlots}, kOp, "successors");
  const Array probs = cpu_result(py::none(), DType::kFloat32, {params.rows, kNgramSlots}, kOp, "probs");
  params.successors = found.view.as<int64_t>();
  params.probs = probs.view.as<float>();
  {
    const py::gil_scoped_release release;
    throw_if(ngram_lookup(params), kOp);
  }
  return py::make_tuple(found.object, probs.object);
}

py::tuple draft(py::object keys, py::object successors, py::object scores, py::object first, py::object second,
                py::object nodes, py::object depth) {
  constexpr const char* kOp = "ngram_draft";
  const Table table(kOp, keys, successors, scores, false);
  NgramDraftParams params = ngram_draft_params(table.args, integer(first, kOp, "first"), integer(second, kOp, "second"),
                                               integer(nodes, kOp, "nodes"), integer(depth, kOp, "depth"));
  const Array tokens = cpu_result(py::none(), DType::kInt64, {params.nodes}, kOp, "tokens");
  const Array parents = cpu_result(py::none(), DType::kInt64, {params.nodes}, kOp, "parents");
  params.tokens = tokens.view.as<int64_t>();
  params.parents = parents.view.as<int64_t>();
  {
    const py::gil_scoped_release release;
    throw_if(ngram_draft(params), kOp);
  }
  return py::make_tuple(tokens.object, parents.object);
}

constexpr const char* kUpdateDoc = R"(Adds weights to the scores of trigrams, in place, row after row.

keys int64 [capacity] (a power of two, -1 where there is no pair), successors and scores int32 [capacity, 12]; trigrams
int64 [rows, 3], weights int64 [rows] in 1/65536. Returns int64 [2]: pairs that are new, and rows that found no room.)";

constexpr const char* kLookupDoc =
    R"(What follows pairs of tokens, the likeliest first: (int64 [rows, 12], float32 [rows, 12]).

contexts int64 [rows, 2]; the table as for ngram_update. -1 behind the last.)";

constexpr const char* kDraftDoc =
    R"(The most likely continuations of two tokens as a tree: (tokens, parents), int64 [nodes].

Best first, by the product of probabilities; at most `nodes` of them (256) and `depth` deep. -1 behind the last token; a
parent of -1 is the token `second`.)";

}  // namespace

void register_ngram(py::module_& m) {
  m.def("ngram_update", &update, kUpdateDoc, py::arg("keys"), py::arg("successors"), py::arg("scores"),
        py::arg("trigrams"), py::arg("weights"));
  m.def("ngram_lookup", &lookup, kLookupDoc, py::arg("keys"), py::arg("successors"), py::arg("scores"),
        py::arg("contexts"));
  m.def("ngram_draft", &draft, kDraftDoc, py::arg("keys"), py::arg("successors"), py::arg("scores"), py::arg("first"),
        py::arg("second"), py::kw_only(), py::arg("nodes") = 64, py::arg("depth") = 8);
}

}  // namespace pycore::python
