// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{vq_encode, rvq_encode, rvq_decode, vq_statistics, vq_rotate}: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/vq_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::optional<std::vector<int64_t>>;

std::vector<int64_t> leading(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return tensor.dim() == 0 ? std::vector<int64_t>{} : std::vector<int64_t>{sizes.begin(), sizes.end() - 1};
}

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

struct Scratch {
  Scratch(const char* op, const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    memory = new_tensor(op, "scratch", like, {bytes}, ScalarType::Byte);
    data = memory->mutable_data_ptr();
  }
  std::optional<Tensor> memory;
  void* data = nullptr;
};

Tensor encode(const char* op, const char* codebook, const Tensor& x, VqEncodeParams params, int64_t width) {
  const Tensor codes = new_tensor(op, "codes", x, with_last(leading(x), width), ScalarType::Long);
  params.codes = codes.mutable_data_ptr<int64_t>();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(op, x, vq_encode_scratch(params, parallel.threads));
  throw_if(vq_encode(params, parallel, scratch.data), op);
  throw_faults(op, codebook, params);
  return codes;
}

Tensor vq_encode_cpu(const Tensor& x_any, const Tensor& codebook_any, Text metric, int64_t topk) {
  constexpr const char* kOp = "vq_encode";
  const Tensor x = last_contiguous(x_any, kOp, "x"), codebook = last_contiguous(codebook_any, kOp, "codebook");
  VqFaults faults;
  const VqEncodeParams params =
      vq_encode_params(view(x, kOp, "x"), view(codebook, kOp, "codebook"), metric, topk, &faults);
  return encode(kOp, "codebook", x, params, topk);
}

Tensor rvq_encode_cpu(const Tensor& x_any, const Tensor& codebooks_any, const Sizes& sizes,
                      std::optional<int64_t> num_quantizers, Text metric, int64_t beam_size,
                      const std::optional<Tensor>& masks_any) {
  constexpr const char* kOp = "rvq_encode";
  const Tensor x = last_contiguous(x_any, kOp, "x"), codebooks = last_contiguous(codebooks_any, kOp, "codebooks");
  const std::optional<Tensor> masks =
      masks_any.has_value() ? std::optional<Tensor>(dense(*masks_any, kOp, "channel_masks")) : std::nullopt;
  VqFaults faults;
  const VqEncodeParams params =
      rvq_encode_params(view(x, kOp, "x"), view(codebooks, kOp, "codebooks"), sizes, num_quantizers, metric, beam_size,
                        view(masks, kOp, "channel_masks"), &faults);
  return encode(kOp, "codebooks", x, params, params.stages);
}

Tensor rvq_decode_cpu(const Tensor& codes_any, const Tensor& codebooks_any, const Sizes& sizes) {
  constexpr const char* kOp = "rvq_decode";
  const Tensor codes = dense(codes_any, kOp, "codes"), codebooks = last_contiguous(codebooks_any, kOp, "codebooks");
  IndexCopies copies;
  VqDecodeParams params =
      rvq_decode_params(view(codes, kOp, "codes"), view(codebooks, kOp, "codebooks"), sizes, &copies);
  const Tensor out = new_tensor(kOp, "out", codebooks, with_last(leading(codes), params.dim), codebooks.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(vq_decode(params, torch_parallel()), kOp);
  return out;
}

std::tuple<Tensor, Tensor> vq_statistics_cpu(const Tensor& x_any, const Tensor& codes_any, int64_t codebook_size) {
  constexpr const char* kOp = "vq_statistics";
  const Tensor x = last_contiguous(x_any, kOp, "x"), codes = dense(codes_any, kOp, "codes");
  IndexCopies copies;
  VqStatisticsParams params =
      vq_statistics_params(view(x, kOp, "x"), view(codes, kOp, "codes"), codebook_size, &copies);
  const ScalarType type = params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor counts = new_tensor(kOp, "counts", x, {codebook_size}, type);
  const Tensor sums = new_tensor(kOp, "sums", x, {codebook_size, params.dim}, type);
  params.counts = counts.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, vq_statistics_scratch(params, parallel.threads));
  throw_if(vq_statistics(params, parallel, scratch.data), kOp);
  return {counts, sums};
}

Tensor vq_rotate_cpu(const Tensor& v_any, const Tensor& x_any, const Tensor& code_any, bool transpose) {
  constexpr const char* kOp = "vq_rotate";
  const Tensor v = last_contiguous(v_any, kOp, "v"), x = last_contiguous(x_any, kOp, "x"),
               code = last_contiguous(code_any, kOp, "code");
  VqRotateParams params = vq_rotate_params(view(v, kOp, "v"), view(x, kOp, "x"), view(code, kOp, "code"), transpose);
  const Tensor out = new_tensor(kOp, "out", v, with_last(leading(v), params.dim), v.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(vq_rotate(params, torch_parallel()), kOp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("vq_encode(Tensor x, Tensor codebook, str metric, SymInt topk) -> Tensor");
  // codebooks: [stages, codes, channels]; sizes: how many codes of each stage count, where that is not all.
  m.def(
      "rvq_encode(Tensor x, Tensor codebooks, SymInt[]? sizes, SymInt? num_quantizers, str metric, SymInt beam_size, "
      "Tensor? channel_masks) -> Tensor");
  m.def("rvq_decode(Tensor codes, Tensor codebooks, SymInt[]? sizes) -> Tensor");
  m.def("vq_statistics(Tensor x, Tensor codes, SymInt codebook_size) -> (Tensor counts, Tensor sums)");
  m.def("vq_rotate(Tensor v, Tensor x, Tensor code, bool transpose) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("vq_encode", TORCH_BOX(&vq_encode_cpu));
  m.impl("rvq_encode", TORCH_BOX(&rvq_encode_cpu));
  m.impl("rvq_decode", TORCH_BOX(&rvq_decode_cpu));
  m.impl("vq_statistics", TORCH_BOX(&vq_statistics_cpu));
  m.impl("vq_rotate", TORCH_BOX(&vq_rotate_cpu));
}

}  // namespace pycore
