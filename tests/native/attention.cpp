// SPDX-License-Identifier: Apache-2.0
// Attention on random problems, under the sanitizers: the kernels in use are compared with the scalar ones.
#include "attention_problem.h"

int main() {
  const pycore::CpuIsa isa = pycore::cpu_isa();
  constexpr int kProblems = 400;
  for (int n = 0; n < kProblems; ++n) {
    Problem problem(210, 230);
    problem.run(pycore::CpuIsa::kScalar, 1);
    const DType dtype = problem.params.forward.dtype;
    const Buffer out = loaded(problem.out, dtype), lse = problem.lse, grad_query = problem.grad_query,
                 grad_key = problem.grad_key, grad_value = problem.grad_value, grad_bias = problem.grad_bias,
                 grad_sinks = problem.grad_sinks, grad_slopes = problem.grad_slopes;
    const double grad_numbers[2] = {problem.grad_numbers[0], problem.grad_numbers[1]};
    problem.run(isa, draw(1, 3));
    // Outputs in half precision may be rounded to neighbours, and gradients start from them.
    const float tolerance = dtype == DType::kFloat32 ? 1e-4f : dtype == DType::kFloat16 ? 2e-3f : 1.6e-2f;
    if (!close("out", loaded(problem.out, dtype), out, tolerance) || !close("lse", problem.lse, lse, 1e-4f) ||
        !close("grad_query", problem.grad_query, grad_query, tolerance) ||
        !close("grad_key", problem.grad_key, grad_key, tolerance) ||
        !close("grad_value", problem.grad_value, grad_value, 1e-4f) ||
        !close("grad_bias", problem.grad_bias, grad_bias, 4 * tolerance) ||
        !close("grad_sink_logits", problem.grad_sinks, grad_sinks, 4 * tolerance) ||
        !close_sums(problem, grad_slopes, grad_numbers, tolerance)) {
      std::fprintf(stderr, "in problem %d\n", n);
      return 1;
    }
  }
  std::printf("%d problems\n", kProblems);
  return 0;
}
