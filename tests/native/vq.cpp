// SPDX-License-Identifier: Apache-2.0
// Nearest codes, decoding, statistics and rotations on odd shapes, with buffers of exactly the size the contract names,
// so that a sanitizer sees every read or write beside them. Codes are compared with the scalar kernels'.
#include <pycore/cpu_isa.h>
#include <pycore/vq/vq.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "kernel_inputs.h"

namespace {

using pycore::Parallel;
using pycore::test::Buffer;
using pycore::test::Scratch;
using pycore::test::threads;

int failures = 0;

Buffer<float> random_floats(int64_t count) { return pycore::test::random_floats(count, 2.0f); }

struct Shape {
  int64_t rows, books, stages, codes, dim, topk, beam, masks;
  bool cosine, half;
};

Buffer<int64_t> encode(const Shape& s, const Buffer<float>& x, const Buffer<float>& books, const Buffer<float>& masks,
                       const int64_t* sizes, int64_t count) {
  Buffer<int64_t> codes(s.rows * s.books * (s.stages == 1 ? s.topk : s.stages));
  // Half precision: the upper halves of the floats, which are bfloat16.
  Buffer<uint16_t> half_books(s.half ? books.count : 0);
  for (int64_t i = 0; i < half_books.count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &books.data[i], sizeof bits);
    half_books.data[i] = static_cast<uint16_t>(bits >> 16);
  }
  pycore::VqFaults faults;
  pycore::VqEncodeParams params;
  pycore::TensorView view;
  view.data = x.data.get();
  view.dims = 3;
  const int64_t shape[] = {s.rows, 1, s.dim}, strides[] = {s.books * s.dim, s.dim, 1};
  std::memcpy(view.shape, shape, sizeof shape);
  std::memcpy(view.strides, strides, sizeof strides);
  params.x = pycore::row_view(view);
  params.book_dtype = s.half ? pycore::DType::kBFloat16 : pycore::DType::kFloat32;
  params.cosine = s.cosine;
  params.dim = s.dim;
  params.books = s.books;
  params.x_book_stride = s.dim;
  params.codebooks = s.half ? static_cast<const void*>(half_books.data.get()) : books.data.get();
  params.code_stride = s.dim;
  params.stage_stride = s.codes * s.dim;
  params.book_stride = s.stages * s.codes * s.dim;
  params.stages = s.stages;
  params.most_codes = s.codes;
  params.sizes = sizes;
  params.masks = s.masks;
  params.channel_masks = masks.data.get();
  params.beam_size = s.beam;
  params.topk = s.topk;
  params.codes = codes.data.get();
  params.faults = &faults;
  const Parallel parallel = threads(count);
  const Scratch scratch(pycore::vq_encode_scratch(params, count));
  failures += !pycore::vq_encode(params, parallel, scratch.data).ok();
  failures += faults.not_finite_row != pycore::VqFaults::kNone || faults.not_finite_code != pycore::VqFaults::kNone;
  return codes;
}

void decode_and_count(const Shape& s, const Buffer<float>& x, const Buffer<float>& books, const Buffer<int64_t>& codes,
                      int64_t count) {
  const Parallel parallel = threads(count);
  Buffer<float> out(s.rows * s.dim);
  pycore::VqDecodeParams decode;
  decode.dim = s.dim;
  decode.rows = s.rows;
  decode.stages = s.stages;
  decode.codes = codes.data.get();
  decode.codebooks = books.data.get();
  decode.stage_stride = s.codes * s.dim;
  decode.code_stride = s.dim;
  decode.out = out.data.get();
  failures += !pycore::vq_decode(decode, parallel).ok();

  Buffer<int64_t> first(s.rows);
  for (int64_t row = 0; row < s.rows; ++row) first.data[row] = row % 7 == 3 ? -1 : codes.data[row * s.stages];
  Buffer<float> counts(s.codes), sums(s.codes * s.dim);
  pycore::VqStatisticsParams statistics;
  statistics.dim = s.dim;
  statistics.codebook_size = s.codes;
  statistics.x.data = x.data.get();
  statistics.x.rows = s.rows;
  statistics.x.dims = 1;
  statistics.x.shape[0] = s.rows;
  statistics.x.strides[0] = s.dim;
  statistics.codes = first.data.get();
  statistics.counts = counts.data.get();
  statistics.sums = sums.data.get();
  const Scratch scratch(pycore::vq_statistics_scratch(statistics, count));
  failures += !pycore::vq_statistics(statistics, parallel, scratch.data).ok();
  float total = 0;
  for (int64_t k = 0; k < s.codes; ++k) total += counts.data[k];
  int64_t expected = 0;
  for (int64_t row = 0; row < s.rows; ++row) expected += first.data[row] >= 0;
  failures += total != static_cast<float>(expected);

  for (const bool transpose : {false, true}) {
    pycore::VqRotateParams rotate;
    rotate.dim = s.dim;
    rotate.transpose = transpose;
    rotate.v = rotate.x = rotate.code = statistics.x;
    rotate.code.data = out.data.get();
    Buffer<float> turned(s.rows * s.dim);
    rotate.out = turned.data.get();
    failures += !pycore::vq_rotate(rotate, parallel).ok();
    for (int64_t i = 0; i < turned.count; ++i) failures += turned.data[i] - turned.data[i] != 0;
  }
}

}  // namespace

int main() {
  const pycore::CpuIsa isa = pycore::cpu_isa();
  // rows, books, stages, codes, dim, topk, beam, masks, cosine, half
  const Shape shapes[] = {
      {0, 1, 1, 5, 3, 1, 1, 0, false, false},     {1, 1, 1, 1, 1, 1, 1, 0, false, false},
      {3, 1, 1, 33, 7, 33, 1, 0, false, false},   {7, 1, 1, 65, 2, 3, 1, 0, false, false},
      {9, 1, 1, 1040, 8, 1, 1, 0, false, false},  {97, 1, 1, 129, 17, 5, 1, 0, true, false},
      {130, 1, 1, 64, 130, 1, 1, 0, false, true}, {11, 3, 1, 70, 5, 2, 1, 0, false, false},
      {25, 1, 4, 50, 33, 1, 1, 2, false, false},  {25, 1, 3, 50, 9, 1, 16, 0, false, false},
      {200, 1, 3, 2, 3, 1, 7, 1, false, false},   {31, 1, 4, 100, 40, 1, 5, 0, true, true},
      {6, 1, 2, 3, 1000, 1, 2, 0, false, false},
  };
  for (const Shape& s : shapes) {
    const Buffer<float> x = random_floats(s.rows * s.books * s.dim);
    const Buffer<float> books = random_floats(s.books * s.stages * s.codes * s.dim);
    const Buffer<float> masks = random_floats(s.masks * s.dim);
    for (const bool sized : {false, true}) {
      std::vector<int64_t> sizes;
      for (int64_t q = 0; q < s.stages; ++q) sizes.push_back(s.codes - (s.stages > 1 ? q % s.codes : 0));
      const int64_t* given = sized ? sizes.data() : nullptr;
      pycore::set_cpu_isa(pycore::CpuIsa::kScalar);
      const Buffer<int64_t> expected = encode(s, x, books, masks, given, 1);
      pycore::set_cpu_isa(isa);
      for (int64_t count : {1, 3}) {
        const Buffer<int64_t> actual = encode(s, x, books, masks, given, count);
        if (!(actual == expected)) {
          std::fprintf(stderr, "failed: %ld rows of %ld, %ld stages of %ld codes, topk %ld, beam %ld on %ld threads\n",
                       long(s.rows), long(s.dim), long(s.stages), long(s.codes), long(s.topk), long(s.beam),
                       long(count));
          ++failures;
        }
        if (s.topk == 1 && s.books == 1) decode_and_count(s, x, books, actual, count);
      }
    }
  }
  return failures == 0 ? 0 : 1;
}
