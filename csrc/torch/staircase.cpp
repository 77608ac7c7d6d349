// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{staircase_quantize, staircase_dequantize}: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/staircase_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& x_any, int64_t bits, int64_t group_size, int64_t dim,
                                                    Text grid) {
  constexpr const char* kOp = "staircase_quantize";
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const TensorView x_view = view(x, kOp, "x");
  StaircaseQuantizeParams params = staircase_quantize_params(x_view, {bits, group_size, dim, grid});
  const std::vector<int64_t> groups = staircase_groups(x_view, params, params.dim);
  const Parallel parallel = torch_parallel();
  const int64_t fault = staircase_fault(params, parallel);
  if (fault >= 0) throw_staircase_fault(params, fault);
  const auto sizes = x.sizes();
  const Tensor codes = new_tensor(kOp, "codes", x, {sizes.begin(), sizes.end()}, torch::headeronly::ScalarType::Byte);
  const Tensor lo = new_tensor(kOp, "lo", x, groups, x.scalar_type());
  const Tensor hi = new_tensor(kOp, "hi", x, groups, x.scalar_type());
  const Tensor centers = new_tensor(kOp, "centers", x, groups, torch::headeronly::ScalarType::Byte);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.lo = static_cast<char*>(lo.mutable_data_ptr());
  params.hi = static_cast<char*>(hi.mutable_data_ptr());
  params.centers = static_cast<uint8_t*>(centers.mutable_data_ptr());
  throw_if(staircase_quantize(params, parallel), kOp);
  return {codes, lo, hi, centers};
}

Tensor dequantize(const Tensor& codes_any, const Tensor& lo_any, const Tensor& hi_any,
                  const std::optional<Tensor>& centers_any, int64_t bits, int64_t group_size, int64_t dim, Text grid) {
  constexpr const char* kOp = "staircase_dequantize";
  const Tensor codes = dense(codes_any, kOp, "codes"), lo = dense(lo_any, kOp, "lo"), hi = dense(hi_any, kOp, "hi");
  std::optional<Tensor> centers;
  if (centers_any) centers = dense(*centers_any, kOp, "centers");
  StaircaseDequantizeParams params =
      staircase_dequantize_params(view(codes, kOp, "codes"), view(lo, kOp, "lo"), view(hi, kOp, "hi"),
                                  view(centers, kOp, "centers"), {bits, group_size, dim, grid});
  const auto sizes = codes.sizes();
  const Tensor out = new_tensor(kOp, "out", lo, {sizes.begin(), sizes.end()}, lo.scalar_type());
  params.out = static_cast<char*>(out.mutable_data_ptr());
  throw_if(staircase_dequantize(params, torch_parallel()), kOp);
  return out;
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  // centers: where in a cell a group's elements lie on average, in 256ths.
  m.def(
      "staircase_quantize(Tensor x, SymInt bits, SymInt group_size, SymInt dim, str grid) -> (Tensor codes, Tensor lo, "
      "Tensor hi, Tensor centers)");
  m.def(
      "staircase_dequantize(Tensor codes, Tensor lo, Tensor hi, Tensor? centers, SymInt bits, SymInt group_size, "
      "SymInt dim, str grid) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("staircase_quantize", TORCH_BOX(&pycore::quantize));
  m.impl("staircase_dequantize", TORCH_BOX(&pycore::dequantize));
}
