// SPDX-License-Identifier: Apache-2.0
// The steps of coding, once for both faces: what is allocated when, and after which kernel a fault becomes a sentence.
//
// A Face has `op`, `parallel`, and
//   memory(bytes, what)      scratch, alive as long as the Face
//   run(kernel)              kernel() -> Status, without the GIL where there is one; a Status that is not ok is thrown
//   offsets(count), data(bytes)               encoding: where results go, int64_t* and uint8_t*
//   symbols(dtype, streams, length)           decoding: void*, of int64, or uint8 for adaptive streams
#pragma once

#include <pycore/arithmetic_coding/arithmetic_coding.h>

#include <cstdint>
#include <vector>

#include "arithmetic_coding_args.h"

namespace pycore {

// `argument` names the model, or the data.
template <class Face>
void encode_streams(Face& face, EncodeParams params, const char* argument) {
  auto results = memory_for<StreamResult>(face.op, "the results of streams", params.streams);
  params.results = results.data();
  int64_t* const ends = face.offsets(params.streams + 1);
  const int64_t room = size_product({params.streams, ac_encode_capacity(params)});
  params.memory = static_cast<uint8_t*>(face.memory(room, "room for the streams"));
  void* const scratch = face.memory(ac_encode_scratch(params, face.parallel.threads), "scratch");
  face.run([&] { return ac_encode(params, face.parallel, scratch); });
  check_results(face.op, results, argument, params.model);
  ends[0] = 0;
  for (int64_t i = 0; i < params.streams; ++i) ends[i + 1] = ends[i] + results[static_cast<size_t>(i)].bytes;
  uint8_t* const data = face.data(ends[params.streams]);
  face.run([&] { return ac_pack_streams(params, ends, data, face.parallel); });
}

// model_of(params) adds the model, which may depend on how many symbols the streams say they have.
template <class Face, class ModelOf>
void decode_streams(Face& face, const TensorView& data, const TensorView& offsets, const char* argument, bool adaptive,
                    const ModelOf& model_of) {
  DecodeMemory memory;
  DecodeParams params = decode_params(face.op, data, offsets, &memory);
  params.adaptive = adaptive;
  face.run([&] { return ac_open_streams(params, face.parallel); });
  check_results(face.op, memory.results, argument, params.model);
  params.length = common_length(face.op, memory.results);
  model_of(&params);
  void* const scratch = face.memory(ac_decode_scratch(params, face.parallel.threads), "scratch");
  face.run([&] { return ac_check_claims(params, face.parallel, scratch); });
  check_results(face.op, memory.results, argument, params.model);
  void* const symbols = face.symbols(adaptive ? DType::kUInt8 : DType::kInt64, params.streams, params.length);
  params.symbols = adaptive ? nullptr : static_cast<int64_t*>(symbols);
  params.bytes = adaptive ? static_cast<uint8_t*>(symbols) : nullptr;
  face.run([&] { return ac_decode(params, face.parallel, scratch); });
  check_results(face.op, memory.results, argument, params.model);
}

}  // namespace pycore
