// SPDX-License-Identifier: Apache-2.0
// The kernels of the linear family on odd shapes and strides in every dtype, with buffers of exactly the size the
// contract names, so that a sanitizer sees every read or write beside them. Results are compared with the scalar
// kernels' bit for bit.
#include <pycore/cpu_isa.h>
#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "kernel_inputs.h"

namespace {

using pycore::Parallel;
using pycore::test::threads;

int failures = 0;

pycore::DType dtype = pycore::DType::kFloat32;  // of the buffers that are made

// Exactly `count` values on the heap; a vector may have spare capacity that hides an overrun.
struct Buffer {
  explicit Buffer(int64_t count, bool random = true)
      : bytes(count * pycore::dtype_size(dtype)), data(new char[static_cast<size_t>(bytes)]) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = random ? pycore::test::random_value(2.0f) : -77.0f;
      if (dtype == pycore::DType::kFloat32) {
        std::memcpy(data.get() + 4 * i, &x, 4);
      } else {
        const bool brain = dtype == pycore::DType::kBFloat16;
        const uint16_t half = brain ? pycore::bfloat16_from_float(x) : pycore::float16_from_float(x);
        std::memcpy(data.get() + 2 * i, &half, 2);
      }
    }
  }
  bool operator==(const Buffer& other) const {
    return std::memcmp(data.get(), other.data.get(), static_cast<size_t>(bytes)) == 0;
  }
  int64_t bytes;
  std::unique_ptr<char[]> data;
};

// Rows [outer, inner, width] with gaps between them: two dimensions that do not merge, or one if inner is 1.
struct Rows {
  Rows(int64_t outer, int64_t inner, int64_t width) : row(width + 3), block(inner * row + 5), buffer(outer * block) {
    pycore::TensorView view;
    // The last row ends where the buffer does.
    view.data = buffer.data.get() + (outer > 0 ? block - (inner - 1) * row - width : 0) * pycore::dtype_size(dtype);
    view.dtype = dtype;
    view.dims = 3;
    const int64_t shape[] = {outer, inner, width}, strides[] = {block, row, 1};
    std::memcpy(view.shape, shape, sizeof(shape));
    std::memcpy(view.strides, strides, sizeof(strides));
    rows = pycore::row_view(view);
  }
  int64_t row, block;
  Buffer buffer;
  pycore::RowView rows;
};

struct Shape {
  int64_t outer, inner, ins, outs;
};

struct Results {
  Buffer out, beside, grad_x, grad_weight, grad_bias, norm, norm_grad_x, norm_grad_weight;
  Buffer layer, layer_grad_x, layer_grad_weight, layer_grad_bias, gated, grad_gate, grad_up;
  explicit Results(const Shape& s, int64_t rows = 0)
      : out((rows = s.outer * s.inner) * s.outs, false),
        beside(rows * s.outs, false),
        grad_x(rows * s.ins, false),
        grad_weight(s.outs * s.ins, false),
        grad_bias(s.outs, false),
        norm(rows * s.ins, false),
        norm_grad_x(rows * s.ins, false),
        norm_grad_weight(s.ins, false),
        layer(rows * s.ins, false),
        layer_grad_x(rows * s.ins, false),
        layer_grad_weight(s.ins, false),
        layer_grad_bias(s.ins, false),
        gated(rows * s.ins, false),
        grad_gate(rows * s.ins, false),
        grad_up(rows * s.ins, false) {}
  bool operator==(const Results& o) const {
    return out == o.out && beside == o.out && grad_x == o.grad_x && grad_weight == o.grad_weight &&
           grad_bias == o.grad_bias && norm == o.norm && norm_grad_x == o.norm_grad_x &&
           norm_grad_weight == o.norm_grad_weight && layer == o.layer && layer_grad_x == o.layer_grad_x &&
           layer_grad_weight == o.layer_grad_weight && layer_grad_bias == o.layer_grad_bias && gated == o.gated &&
           grad_gate == o.grad_gate && grad_up == o.grad_up;
  }
};

void run(const Shape& s, const Rows& x, const Rows& grad, const Buffer& weight, const Buffer& bias, const Buffer& scale,
         int64_t count, pycore::Gate function, Results* results) {
  const Parallel parallel = threads(count);
  pycore::LinearParams forward;
  forward.dtype = dtype;
  forward.in_features = s.ins;
  forward.out_features = s.outs;
  forward.x = x.rows;
  forward.weight = weight.data.get();
  forward.weight_stride = s.ins;
  forward.bias = bias.data.get();
  forward.out = results->out.data.get();
  forward.out_stride = s.outs;
  std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(pycore::linear_forward_scratch(forward, count))]);
  failures += !pycore::linear_forward(&forward, 1, parallel, scratch.get()).ok();

  // The same outputs by three layers side by side, one of them narrow, each with a weight of its own.
  const int64_t cuts[] = {0, s.outs / 3, (s.outs + 4) / 3, s.outs}, size = pycore::dtype_size(dtype);
  std::vector<Buffer> weights;
  pycore::LinearParams layers[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t outs = cuts[i + 1] - cuts[i];
    weights.emplace_back(outs * s.ins, false);
    std::memcpy(weights[i].data.get(), weight.data.get() + cuts[i] * s.ins * size,
                static_cast<size_t>(weights[i].bytes));
    layers[i] = forward;
    layers[i].out_features = outs;
    layers[i].weight = weights[i].data.get();
    layers[i].bias = bias.data.get() + cuts[i] * size;
    layers[i].out = results->beside.data.get() + cuts[i] * size;
  }
  failures += !pycore::linear_forward(layers, 3, parallel, scratch.get()).ok();

  pycore::LinearBackwardParams backward;
  backward.dtype = dtype;
  backward.in_features = s.ins;
  backward.out_features = s.outs;
  backward.grad_out = grad.rows;
  backward.x = x.rows;
  backward.weight = weight.data.get();
  backward.weight_stride = s.ins;
  backward.grad_x = results->grad_x.data.get();
  backward.grad_weight = results->grad_weight.data.get();
  backward.grad_bias = results->grad_bias.data.get();
  scratch.reset(new char[static_cast<size_t>(pycore::linear_backward_scratch(backward, count))]);
  failures += !pycore::linear_backward(backward, parallel, scratch.get()).ok();

  pycore::RmsNormParams norm;
  norm.dtype = dtype;
  norm.channels = s.ins;
  norm.x = x.rows;
  norm.weight = scale.data.get();
  norm.out = results->norm.data.get();
  failures += !pycore::rms_norm_forward(norm, parallel).ok();

  pycore::RmsNormBackwardParams norm_backward;
  norm_backward.dtype = dtype;
  norm_backward.channels = s.ins;
  norm_backward.grad_out = norm_backward.x = x.rows;
  norm_backward.weight = scale.data.get();
  norm_backward.grad_x = results->norm_grad_x.data.get();
  norm_backward.grad_weight = results->norm_grad_weight.data.get();
  scratch.reset(new char[static_cast<size_t>(pycore::rms_norm_backward_scratch(norm_backward, count))]);
  failures += !pycore::rms_norm_backward(norm_backward, parallel, scratch.get()).ok();

  pycore::LayerNormParams layer;
  layer.dtype = dtype;
  layer.channels = s.ins;
  layer.x = x.rows;
  layer.weight = layer.bias = scale.data.get();
  layer.out = results->layer.data.get();
  failures += !pycore::layer_norm_forward(layer, parallel).ok();

  pycore::LayerNormBackwardParams layer_backward;
  layer_backward.dtype = dtype;
  layer_backward.channels = s.ins;
  layer_backward.grad_out = layer_backward.x = x.rows;
  layer_backward.weight = scale.data.get();
  layer_backward.grad_x = results->layer_grad_x.data.get();
  layer_backward.grad_weight = results->layer_grad_weight.data.get();
  layer_backward.grad_bias = results->layer_grad_bias.data.get();
  scratch.reset(new char[static_cast<size_t>(pycore::layer_norm_backward_scratch(layer_backward, count))]);
  failures += !pycore::layer_norm_backward(layer_backward, parallel, scratch.get()).ok();

  pycore::GatedParams gated;
  gated.dtype = dtype;
  gated.function = function;
  gated.channels = s.ins;
  gated.gate = gated.up = x.rows;
  gated.out = results->gated.data.get();
  failures += !pycore::gated_forward(gated, parallel).ok();

  pycore::GatedBackwardParams gated_backward;
  gated_backward.dtype = dtype;
  gated_backward.function = function;
  gated_backward.channels = s.ins;
  gated_backward.grad_out = gated_backward.gate = gated_backward.up = x.rows;
  gated_backward.grad_gate = results->grad_gate.data.get();
  gated_backward.grad_up = results->grad_up.data.get();
  failures += !pycore::gated_backward(gated_backward, parallel).ok();
}

}  // namespace

int main() {
  const pycore::CpuIsa isa = pycore::cpu_isa();
  const Shape shapes[] = {{0, 1, 5, 7},     {1, 1, 0, 7},     {1, 1, 1, 1},       {1, 1, 257, 83},   {3, 1, 17, 33},
                          {2, 3, 64, 64},   {7, 1, 300, 129}, {5, 5, 63, 70},     {30, 13, 31, 200}, {300, 1, 9, 5},
                          {1, 1, 600, 530}, {4, 1, 33, 400},  {270, 1, 130, 193}, {2, 1, 2100, 70},  {1, 6, 47, 65},
                          {2, 2, 2049, 31}, {700, 1, 40, 530}};
  const pycore::Gate functions[] = {pycore::Gate::kSilu, pycore::Gate::kGelu, pycore::Gate::kGeluTanh};
  int which = 0;
  for (const pycore::DType each : {pycore::DType::kFloat32, pycore::DType::kBFloat16, pycore::DType::kFloat16}) {
    dtype = each;
    for (const Shape& s : shapes) {
      const pycore::Gate function = functions[which++ % 3];
      const Rows x(s.outer, s.inner, s.ins), grad(s.outer, s.inner, s.outs);
      const Buffer weight(s.outs * s.ins), bias(s.outs), scale(s.ins);
      pycore::set_cpu_isa(pycore::CpuIsa::kScalar);
      Results expected(s);
      run(s, x, grad, weight, bias, scale, 1, function, &expected);
      pycore::set_cpu_isa(isa);
      for (int64_t count : {1, 3}) {
        Results actual(s);
        run(s, x, grad, weight, bias, scale, count, function, &actual);
        if (actual == expected) continue;
        std::fprintf(stderr, "failed: dtype %d, %ld x %ld rows of %ld to %ld on %ld threads\n", int(dtype),
                     long(s.outer), long(s.inner), long(s.ins), long(s.outs), long(count));
        ++failures;
      }
    }
  }
  return failures == 0 ? 0 : 1;
}
