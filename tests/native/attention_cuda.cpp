// SPDX-License-Identifier: Apache-2.0
// The CUDA attention kernels on the CPU (cuda_emulation.h), compared with the scalar kernels on random problems.
#include <pycore/attention.h>
#include <pycore/attention_blocks.h>
#include <pycore/attention_rows.h>

#include "attention_problem.h"
#include "cuda_emulation.h"

// The library has launchers of its own, which say that there is no CUDA.
#define launch_attention_forward emulated_forward
#define launch_attention_forward_scratch emulated_forward_scratch
#define launch_attention_backward emulated_backward
#define launch_attention_backward_scratch emulated_backward_scratch
#define launch_attention_blocks emulated_blocks
#define launch_block_correction emulated_correction
#include "../../csrc/cuda/attention.backward_bfloat16.cu"
#include "../../csrc/cuda/attention.backward_float16.cu"
#include "../../csrc/cuda/attention.backward_float32.cu"
#include "../../csrc/cuda/attention.bfloat16.cu"
#include "../../csrc/cuda/attention.blocks.cu"
#include "../../csrc/cuda/attention.cu"
#include "../../csrc/cuda/attention.float16.cu"
#include "../../csrc/cuda/attention.float32.cu"
#include "../../csrc/cuda/attention.plain.cu"
#include "../../csrc/cuda/attention.plain_backward.cu"
#include "../../csrc/cuda/attention.tables.cu"
namespace {

// Fills the problem's results from the emulated kernels.
void emulate(Problem* problem) {
  pycore::AttentionBackwardParams& params = problem->params;
  const int64_t bytes = pycore::emulated_backward_scratch(params);
  const auto scratch = aligned(bytes);
  std::memset(scratch.get(), 0xff, bytes);
  for (Buffer* buffer :
       {&problem->lse, &problem->delta, &problem->grad_query, &problem->grad_key, &problem->grad_value}) {
    std::fill(buffer->begin(), buffer->end(), NAN);
  }
  if (params.grad_bias) std::fill(problem->grad_bias.begin(), problem->grad_bias.end(), NAN);
  if (params.grad_sink_logits) std::fill(problem->grad_sinks.begin(), problem->grad_sinks.end(), NAN);
  std::fill(problem->out.begin(), problem->out.end(), -1);
  const int64_t forward_bytes = pycore::emulated_forward_scratch(params.forward);
  const auto forward_scratch = aligned(forward_bytes);
  std::memset(forward_scratch.get(), 0xff, forward_bytes);
  void* given = draw(0, 1) ? forward_scratch.get() : nullptr;
  if (!pycore::emulated_forward(params.forward, given, nullptr).ok()) std::abort();
  if (!pycore::emulated_backward(params, scratch.get(), nullptr).ok()) std::abort();
}

bool compare(int64_t number) {
  Problem problem(90, 150);
  problem.run(pycore::CpuIsa::kScalar, 1);
  const DType dtype = problem.params.forward.dtype;
  const Problem expected = problem;
  emulation::emulation.reversed = draw(0, 1);
  emulate(&problem);
  const float half = dtype == DType::kFloat16 ? 2e-3f : 1.6e-2f;
  // Weights are rounded to the dtype before they meet the values, rotated queries and keys before they meet each other;
  // the CPU's are not.
  const bool rounds = dtype != DType::kFloat32 && problem.params.forward.rope_cos;
  const float tolerance = dtype == DType::kFloat32 ? 1e-4f : rounds ? 4 * half : 2 * half;
  const float lse_tolerance = rounds ? half : 1e-4f;
  const bool same = close("out", loaded(problem.out, dtype), loaded(expected.out, dtype), tolerance) &&
                    close("lse", problem.lse, expected.lse, lse_tolerance) &&
                    close("grad_query", problem.grad_query, expected.grad_query, tolerance) &&
                    close("grad_key", problem.grad_key, expected.grad_key, tolerance) &&
                    close("grad_value", problem.grad_value, expected.grad_value, tolerance) &&
                    close("grad_bias", problem.grad_bias, expected.grad_bias, 4 * tolerance) &&
                    close("grad_sink_logits", problem.grad_sinks, expected.grad_sinks, 4 * tolerance);
  if (!same) {
    const pycore::AttentionParams& p = problem.params.forward;
    std::fprintf(stderr, "in problem %ld: schedule %d, dtype %d, %ld queries, %ld keys, rope %d, reversed %d\n", number,
                 static_cast<int>(p.schedule.kind), static_cast<int>(dtype), p.query_length, p.key_length,
                 p.rope_cos != nullptr, emulation::emulation.reversed);
  }
  return same;
}

// Rows of a problem again in other company: the same bits.
struct Alone {
  std::vector<char> out;
  Buffer lse;

  // Query rows first .. first + count - 1 of batch row b, as a problem of their own; `split` gives scratch.
  Alone(const pycore::AttentionParams& whole, int64_t b, int64_t first, int64_t count, bool split) {
    pycore::AttentionParams p = whole;
    const int64_t size = pycore::dtype_size(p.dtype);
    const auto move = [&](const void* data, int64_t elements) {
      return static_cast<const char*>(data) + elements * size;
    };
    p.batch = 1;
    p.query_length = count;
    p.query = move(p.query, b * p.query_strides.batch + first * p.query_strides.row);
    p.key = move(p.key, b * p.key_strides.batch);
    p.value = move(p.value, b * p.value_strides.batch);
    // The last query stands at the last key: keys after it are cut off.
    const int64_t length = p.key_lengths[b] - (whole.query_length - first - count);
    p.key_lengths = &length;
    out.resize(p.heads * count * p.value_dim * size);
    lse.resize(p.heads * count);
    p.out = out.data();
    p.lse = lse.data();
    const int64_t bytes = pycore::emulated_forward_scratch(p);
    const auto scratch = aligned(bytes);
    if (!pycore::emulated_forward(p, split ? scratch.get() : nullptr, nullptr).ok()) std::abort();
  }
};

bool compare_bits(int64_t number) {
  pycore::AttentionParams p;
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  p.dtype = dtypes[draw(0, 2)];
  p.batch = 2;
  p.kv_heads = draw(1, 2);
  p.heads = p.kv_heads * draw(1, 4);
  p.query_length = draw(2, 140);
  p.key_length = draw(p.query_length, 2400);
  p.head_dim = draw(0, 1) ? 64 : draw(3, 80);
  p.value_dim = p.head_dim;
  p.scale = 0.3;
  p.schedule.kind = draw(0, 1) ? ScheduleKind::kCausal : ScheduleKind::kLambda;
  if (p.schedule.kind == ScheduleKind::kLambda) {
    p.schedule.sink_size = draw(0, 100);
    p.schedule.window_size = draw(1, 1300);
  }
  Buffer cosine, sine;
  if (draw(0, 2) == 0) {
    p.rope_dim = p.head_dim / 2 * 2;
    p.rope_stride = p.rope_dim / 2;
    p.rope_rows = p.key_length + pycore::kKeyTile;
    p.distance_limit = std::max<int64_t>(p.schedule.window_size, 300);
    for (int64_t n = 0; n < p.rope_rows * p.rope_stride; ++n) {
      cosine.push_back(std::cos(n * 0.01));
      sine.push_back(std::sin(n * 0.01));
    }
    p.rope_cos = cosine.data();
    p.rope_sin = sine.data();
  }
  const auto strides = [](int64_t heads, int64_t length, int64_t channels) {
    return pycore::AttentionStrides{heads * length * channels, length * channels, channels};
  };
  p.query_strides = strides(p.heads, p.query_length, p.head_dim);
  p.key_strides = p.value_strides = strides(p.kv_heads, p.key_length, p.head_dim);
  const auto query = stored(normal(p.batch * p.heads * p.query_length * p.head_dim), p.dtype);
  Buffer keys = normal(p.batch * p.kv_heads * p.key_length * p.head_dim), values = keys;
  const std::vector<int64_t> lengths = {p.key_length, draw(p.query_length, p.key_length)};
  // Of batch row 1 the newest key holds NaN: only rows that see it may.
  const int64_t poisoned = lengths[1] - 1;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    std::fill_n(values.begin() + ((p.kv_heads + h) * p.key_length + poisoned) * p.head_dim, p.head_dim,
                draw(0, 1) ? NAN : INFINITY);
  }
  const auto key = stored(keys, p.dtype), value = stored(values, p.dtype);
  p.query = query.data();
  p.key = key.data();
  p.value = value.data();
  p.key_lengths = lengths.data();
  std::vector<char> out(query.size());
  Buffer lse(p.batch * p.heads * p.query_length);
  p.out = out.data();
  p.lse = lse.data();
  emulation::emulation.reversed = draw(0, 1);
  if (!pycore::emulated_forward(p, nullptr, nullptr).ok()) std::abort();

  const int64_t row_bytes = p.value_dim * pycore::dtype_size(p.dtype);
  const int64_t b = draw(0, 1), count = draw(0, 1) ? 1 : draw(1, p.query_length);
  const int64_t first = draw(0, p.query_length - count);
  for (const bool split : {false, true}) {
    emulation::emulation.reversed = draw(0, 1);
    const Alone alone(p, b, first, count, split);
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t row = (b * p.heads + h) * p.query_length + first;
      if (std::memcmp(out.data() + row * row_bytes, alone.out.data() + h * count * row_bytes, count * row_bytes) == 0 &&
          std::memcmp(lse.data() + row, alone.lse.data() + h * count, count * sizeof(float)) == 0) {
        continue;
      }
      std::fprintf(stderr, "failed: rows %ld to %ld of head %ld have other bits alone%s, in problem %ld\n", first,
                   first + count - 1, h, split ? " and split" : "", number);
      return false;
    }
  }
  const Buffer numbers = loaded(out, p.dtype);
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t i = 0; i < p.query_length; ++i) {
      const int64_t row = (p.heads + h) * p.query_length + i;
      const bool sees = i == p.query_length - 1;
      if (std::isfinite(numbers[row * p.value_dim]) != sees) continue;
      std::fprintf(stderr, "failed: what is not finite in a key's value %s row %ld, in problem %ld\n",
                   sees ? "does not reach" : "reaches", i, number);
      return false;
    }
  }
  return true;
}

// The same bits as on the CPU.
bool compare_blocks(int64_t number) {
  pycore::BlockParams params;
  pycore::AttentionParams& rows = params.rows;
  rows.batch = draw(1, 3);
  rows.heads = draw(1, 3);
  rows.query_length = draw(1, 300);
  rows.key_length = draw(1, 3000);
  rows.schedule.kind = ScheduleKind::kBlocks;
  rows.schedule.sink_size = draw(0, 90);
  rows.schedule.window_blocks = draw(0, 3);
  rows.schedule.block_shift = draw(0, 2) ? draw(4, 7) : 0;
  rows.schedule.block_rows = pycore::touched_blocks(rows.query_length, rows.schedule.block_shift);
  rows.schedule.block_words = pycore::bitmap_words(rows.key_length, rows.schedule.block_shift);
  std::vector<int64_t> starts, lengths, offsets, queries, seeds;
  for (int64_t b = 0; b < rows.batch; ++b) {
    lengths.push_back(draw(0, rows.key_length));
    starts.push_back(draw(0, lengths[b]));
    offsets.push_back(draw(0, 1) ? draw(0, 9000) : 0);
    queries.push_back(draw(0, rows.query_length));
    seeds.push_back(static_cast<int64_t>(engine()) << 30 | engine());
  }
  if (draw(0, 1)) {
    rows.key_lengths = lengths.data();
    rows.key_starts = starts.data();
    rows.key_offset = offsets.data();
    rows.query_lengths = queries.data();
  }
  const int64_t round = draw(0, 1000);
  params.seeds = seeds.data();
  params.seed_stride = draw(0, 1);
  params.round = &round;
  params.diagonal = draw(0, 3) == 0;
  if (draw(0, 1)) params.blocks_per_row = rows.schedule.window_blocks + draw(1, 40);
  params.probability_length = draw(1, 60);
  params.probability_stride = draw(0, 1) ? params.probability_length : 0;
  std::vector<double> probabilities(rows.heads * params.probability_length);
  for (double& p : probabilities) p = draw(0, 4) ? draw(0, 1000) / 1000.0 : draw(0, 1);
  params.probabilities = probabilities.data();

  std::vector<uint64_t> expected(rows.batch * rows.heads * rows.schedule.block_rows * rows.schedule.block_words);
  std::vector<uint64_t> actual(expected.size(), 0x5555555555555555);
  params.blocks = expected.data();
  pycore::Parallel parallel;
  parallel.threads = 1;
  parallel.run = [](void*, int64_t, void (*body)(void*, int64_t), void* argument) { body(argument, 0); };
  const auto scratch = aligned(pycore::attention_blocks_scratch(params, 1));
  if (!pycore::attention_blocks(params, parallel, scratch.get()).ok()) std::abort();
  params.blocks = actual.data();
  if (!pycore::emulated_blocks(params, nullptr).ok()) std::abort();
  const int64_t tables = params.probability_stride ? rows.heads : 1;
  Buffer added(tables * params.probability_length), emulated(added.size());
  pycore::block_correction(probabilities.data(), static_cast<int64_t>(added.size()), DType::kFloat32, added.data());
  if (!pycore::emulated_correction(params, tables, emulated.data(), nullptr).ok()) std::abort();
  if (expected == actual && added == emulated) return true;
  std::fprintf(stderr, "failed: other blocks or corrections than the CPU's, in round %ld\n", number);
  return false;
}

}  // namespace

// The number of problems, 60 unless given.
int main(int count, char** arguments) {
  const int64_t problems = count > 1 ? std::atoll(arguments[1]) : 60;
  for (int64_t n = 0; n < problems; ++n) {
    if (!compare(n) || !compare_bits(n) || !compare_blocks(n)) return 1;
  }
  std::printf("%ld problems\n", problems);
  return 0;
}
