// SPDX-License-Identifier: Apache-2.0
// The pairwise kernels on odd shapes and strides, with buffers of exactly the size the contract names, so that a
// sanitizer sees every read or write beside them. Results are those of the scalar kernels within rounding, and the same
// bits on one thread and on three.
#include <pycore/cpu_isa.h>
#include <pycore/pairwise/pairwise.h>

#include <cmath>
#include <cstdio>

#include "kernel_inputs.h"

namespace {

using pycore::Parallel;
using pycore::test::Buffer;
using pycore::test::Scratch;
using pycore::test::threads;

int failures = 0;

Buffer<float> random_buffer(int64_t count) { return pycore::test::random_floats(count, 0.5f); }

struct Shape {
  int64_t batch, rows, columns, dim;
};

struct Inputs {
  explicit Inputs(const Shape& s)
      : x_row(s.dim + 3),
        x(random_buffer(s.batch * s.rows * x_row)),
        y(random_buffer(s.batch * s.columns * s.dim)),
        bias(random_buffer(s.batch * s.columns)),
        weights(random_buffer(s.batch * s.rows * 4)),
        target(s.batch * s.rows) {
    for (int64_t i = 0; i < target.count; ++i) target.data[i] = i * 7 % (s.columns + 1) - 1;
  }
  int64_t x_row;
  Buffer<float> x, y, bias, weights;
  Buffer<int64_t> target;
};

struct Results {
  explicit Results(const Shape& s, int64_t kept)
      : k(kept),
        lse(s.batch * s.rows),
        target(s.batch * s.rows),
        sum(s.batch * s.rows),
        grad_x(s.batch * s.rows * s.dim),
        grad_y(s.batch * s.columns * s.dim),
        grad_bias(s.batch * s.columns),
        column_lse(s.batch * s.columns),
        both_x(s.batch * s.rows * s.dim),
        both_y(s.batch * s.columns * s.dim),
        scores(s.batch * s.rows * k),
        pairs_x(s.batch * s.rows * s.dim),
        pairs_y(s.batch * s.columns * s.dim),
        indices(s.batch * s.rows * k) {}
  template <class F>
  void each(const Results& other, const F& f) const {
    f(lse, other.lse);
    f(target, other.target);
    f(sum, other.sum);
    f(grad_x, other.grad_x);
    f(grad_y, other.grad_y);
    f(grad_bias, other.grad_bias);
    f(column_lse, other.column_lse);
    f(both_x, other.both_x);
    f(both_y, other.both_y);
    f(scores, other.scores);
    f(pairs_x, other.pairs_x);
    f(pairs_y, other.pairs_y);
  }
  int64_t k;
  Buffer<float> lse, target, sum, grad_x, grad_y, grad_bias, column_lse, both_x, both_y, scores, pairs_x, pairs_y;
  Buffer<int64_t> indices;
};

void fill(const Shape& s, const Inputs& in, bool euclidean, pycore::PairwiseParams* params) {
  params->euclidean = euclidean;
  params->batch = s.batch;
  params->rows = s.rows;
  params->columns = s.columns;
  params->dim = s.dim;
  // The last row of x ends where the buffer does.
  params->x = {in.x.data.get() + (in.x.count > 0 ? 3 : 0), s.rows * in.x_row, in.x_row};
  params->y = {in.y.data.get(), s.columns * s.dim, s.dim};
}

void logsumexp(const Shape& s, const Inputs& in, bool euclidean, const Parallel& parallel, bool gradients,
               Results* out) {
  pycore::PairwiseLogsumexpParams params;
  fill(s, in, euclidean, &params);
  params.scale = euclidean ? -0.05 : 0.7;
  params.softcap = s.dim % 2 ? 4.0 : 0.0;
  params.y_bias = in.bias.data.get();
  params.bias_batch_stride = s.columns;
  params.target = in.target.data.get();
  params.lse = out->lse.data.get();
  params.target_logit = out->target.data.get();
  params.logit_sum = out->sum.data.get();
  if (gradients) {
    params.weights = in.weights.data.get();
    params.grad_x = out->grad_x.data.get();
    params.grad_y = out->grad_y.data.get();
    params.grad_bias = out->grad_bias.data.get();
  }
  const Scratch scratch(pairwise_logsumexp_scratch(params, parallel.threads));
  failures += !pairwise_logsumexp(params, parallel, scratch.data).ok();
}

// Rows and columns in one pass, and the gradients of both.
void both(const Shape& s, const Inputs& in, const Parallel& parallel, Results* out) {
  pycore::PairwiseLogsumexpParams params;
  fill(s, in, false, &params);
  const Buffer<float> lse(s.batch * s.rows), target(s.batch * s.rows);
  params.target = in.target.data.get();
  params.lse = lse.data.get();
  params.target_logit = target.data.get();
  params.column_lse = out->column_lse.data.get();
  const Scratch scratch(pairwise_logsumexp_scratch(params, parallel.threads));
  failures += !pairwise_logsumexp(params, parallel, scratch.data).ok();
  params.weights = in.weights.data.get();
  params.column_weights = in.bias.data.get();
  params.grad_x = out->both_x.data.get();
  params.grad_y = out->both_y.data.get();
  const Scratch more(pairwise_logsumexp_scratch(params, parallel.threads));
  failures += !pairwise_logsumexp(params, parallel, more.data).ok();
}

void topk(const Shape& s, const Inputs& in, bool euclidean, const Parallel& parallel, Results* out) {
  pycore::PairwiseFaults faults;
  pycore::PairwiseTopkParams params;
  fill(s, in, euclidean, &params);
  params.k = out->k;
  params.scores = out->scores.data.get();
  params.indices = out->indices.data.get();
  params.faults = &faults;
  const Scratch scratch(pairwise_topk_scratch(params, parallel.threads));
  failures += !pairwise_topk(params, parallel, scratch.data).ok();
  pycore::PairwisePairsBackwardParams backward;
  fill(s, in, euclidean, &backward);
  backward.k = out->k;
  backward.indices = params.indices;
  backward.grad = out->scores.data.get();
  backward.grad_x = out->pairs_x.data.get();
  backward.grad_y = out->pairs_y.data.get();
  failures += !pairwise_pairs_backward(backward, parallel).ok();
}

void check(bool condition, const Shape& s, bool euclidean, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s, %ld batches of %ld by %ld, %ld channels, euclidean %d\n", what, long(s.batch),
               long(s.rows), long(s.columns), long(s.dim), euclidean);
  ++failures;
}

bool near(const Buffer<float>& a, const Buffer<float>& b) {
  double most = 1e-3, error = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    if (std::isinf(a.data[i]) && a.data[i] == b.data[i]) continue;
    most = std::fmax(most, std::fabs(b.data[i]));
    error = std::fmax(error, std::fabs(double(a.data[i]) - b.data[i]));
    if (std::isnan(a.data[i])) return false;
  }
  return error <= 2e-5 * most;
}

}  // namespace

int main() {
  const pycore::CpuIsa isa = pycore::cpu_isa();
  const Shape shapes[] = {{1, 1, 1, 1},      {2, 7, 13, 5},    {1, 0, 4, 3},     {2, 5, 0, 3},
                          {1, 3, 70, 0},     {1, 97, 65, 16},  {3, 2, 1025, 17}, {1, 1, 200, 40},
                          {1, 100, 1030, 9}, {1, 13, 33, 259}, {1, 2, 5000, 40}};
  for (const Shape& s : shapes) {
    for (const bool euclidean : {false, true}) {
      const Inputs in(s);
      const int64_t k = s.columns < 4 ? s.columns : 4;
      pycore::set_cpu_isa(pycore::CpuIsa::kScalar);
      Results expected(s, k);
      logsumexp(s, in, euclidean, threads(1), true, &expected);
      both(s, in, threads(1), &expected);
      if (k > 0) topk(s, in, euclidean, threads(1), &expected);
      pycore::set_cpu_isa(isa);
      Results one(s, k), three(s, k), plain(s, k);
      logsumexp(s, in, euclidean, threads(1), true, &one);
      logsumexp(s, in, euclidean, threads(3), true, &three);
      both(s, in, threads(1), &one);
      both(s, in, threads(3), &three);
      logsumexp(s, in, euclidean, threads(3), false, &plain);
      if (k > 0) {
        topk(s, in, euclidean, threads(1), &one);
        topk(s, in, euclidean, threads(3), &three);
        check(one.indices == expected.indices, s, euclidean, "indices");
      }
      one.each(expected, [&](const auto& a, const auto& b) { check(near(a, b), s, euclidean, "results"); });
      one.each(three, [&](const auto& a, const auto& b) { check(a == b, s, euclidean, "threads"); });
      check(plain.lse == one.lse && plain.target == one.target && plain.sum == one.sum, s, euclidean, "forward");
    }
  }
  return failures == 0 ? 0 : 1;
}
