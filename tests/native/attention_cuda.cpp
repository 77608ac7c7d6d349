// SPDX-License-Identifier: Apache-2.0
// The CUDA attention kernels on the CPU (cuda_emulation.h), compared with the scalar kernels on random problems.
#include <pycore/attention/attention.h>
#include <pycore/attention/blocks.h>
#include <pycore/attention/rows.h>

#include "attention_problem.h"
#include "cuda_emulation.h"

// The library has launchers of its own, which say that there is no CUDA.
#define launch_attention_forward emulated_forward
#define launch_attention_forward_scratch emulated_forward_scratch
#define launch_attention_backward emulated_backward
#define launch_attention_backward_scratch emulated_backward_scratch
#define launch_attention_blocks emulated_blocks
#define launch_block_correction emulated_correction
#include "../../csrc/cuda/attention/backward_bfloat16.cu"
#include "../../csrc/cuda/attention/backward_float16.cu"
#include "../../csrc/cuda/attention/backward_float32.cu"
#include "../../csrc/cuda/attention/blocks.cu"
#include "../../csrc/cuda/attention/dispatch.cu"
#include "../../csrc/cuda/attention/forward_bfloat16.cu"
#include "../../csrc/cuda/attention/forward_float16.cu"
#include "../../csrc/cuda/attention/forward_float32.cu"
#include "../../csrc/cuda/attention/plain.cu"
#include "../../csrc/cuda/attention/plain_backward.cu"
#include "../../csrc/cuda/attention/tables.cu"
namespace {

// Fills the problem's results from the emulated kernels.
void emulate(Problem* problem) {
  pycore::AttentionBackwardParams& params = problem->params;
  const int64_t bytes = pycore::emulated_backward_scratch(params);
  const auto scratch = aligned(bytes);
  std::memset(scratch.get(), 0xff, bytes);
  for (Buffer* buffer : {&problem->lse, &problem->lse_low, &problem->delta, &problem->grad_query, &problem->grad_key,
                         &problem->grad_value}) {
    std::fill(buffer->begin(), buffer->end(), NAN);
  }
  if (params.grad_bias) std::fill(problem->grad_bias.begin(), problem->grad_bias.end(), NAN);
  if (params.grad_sink_logits) std::fill(problem->grad_sinks.begin(), problem->grad_sinks.end(), NAN);
  if (params.grad_slopes) std::fill(problem->grad_slopes.begin(), problem->grad_slopes.end(), NAN);
  std::fill(problem->grad_numbers, problem->grad_numbers + 2, NAN);
  std::fill(problem->out.begin(), problem->out.end(), -1);
  const int64_t forward_bytes = pycore::emulated_forward_scratch(params.forward);
  const auto forward_scratch = aligned(forward_bytes);
  std::memset(forward_scratch.get(), 0xff, forward_bytes);
  void* given = draw(0, 1) ? forward_scratch.get() : nullptr;
  if (!pycore::emulated_forward(params.forward, given, nullptr).ok()) std::abort();
  if (!pycore::emulated_backward(params, scratch.get(), nullptr).ok()) std::abort();
}

bool compare(int64_t number) {
  // Sometimes wide rows; sometimes a device without the memory for tiles, where the plain kernels run.
  Problem problem(90, 150, draw(0, 3) ? 70 : 256);
  emulation::emulation.shared_limit = draw(0, 4) ? 227 << 10 : 24 << 10;
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
                    close("grad_sink_logits", problem.grad_sinks, expected.grad_sinks, 4 * tolerance) &&
                    close_sums(problem, expected.grad_slopes, expected.grad_numbers, tolerance);
  if (!same) {
    const pycore::AttentionParams& p = problem.params.forward;
    std::fprintf(stderr, "in problem %ld: schedule %d, dtype %d, %ld queries, %ld keys, rope %d, reversed %d\n", number,
                 static_cast<int>(p.schedule.kind), static_cast<int>(dtype), p.query_length, p.key_length,
                 p.rope_cos != nullptr, emulation::emulation.reversed);
  }
  return same;
}

// Where logits are in the thousands and one key has nearly all the weight, grad_value still has float32's accuracy:
// with lse in one float it would be off by what rounding it left out, some 2^-14.
bool compare_peaked(int64_t number) {
  pycore::AttentionBackwardParams params;
  pycore::AttentionParams& p = params.forward;
  p.batch = 1;
  p.heads = 2;
  p.kv_heads = draw(1, 2);
  p.query_length = draw(1, 90);
  p.key_length = draw(p.query_length, draw(0, 2) ? 200 : 2300);
  p.head_dim = p.value_dim = draw(8, 70);
  p.scale = 0.2;
  p.bias_length = p.bias_stride = p.key_length;
  Buffer bias;
  for (int64_t d = 0; d < p.heads * p.bias_length; ++d) bias.push_back(30.1f * (d % p.bias_length));
  const int64_t queries = p.heads * p.query_length * p.head_dim, keys = p.kv_heads * p.key_length * p.head_dim;
  Buffer query = normal(queries), key = normal(keys), value = normal(keys), grad_out = normal(queries);
  p.query_strides = {queries, p.query_length * p.head_dim, p.head_dim};
  p.key_strides = p.value_strides = {keys, p.key_length * p.head_dim, p.head_dim};
  params.grad_out_strides = p.query_strides;
  Buffer sinks = {-7000, -INFINITY};
  const bool with_sinks = draw(0, 1), with_bias = draw(0, 3);
  // Without a bias, the queries do it.
  for (float& x : query) x *= with_bias ? 1 : 2000;
  if (draw(0, 2) == 0) p.softcap = 4000;
  emulation::emulation.shared_limit = draw(0, 2) ? 227 << 10 : 24 << 10;

  const auto run = [&](auto* zero) {
    using T = std::remove_pointer_t<decltype(zero)>;
    const auto copy = [](const Buffer& x) { return std::vector<T>(x.begin(), x.end()); };
    const std::vector<T> q = copy(query), k = copy(key), v = copy(value), g = copy(grad_out), b = copy(bias);
    const std::vector<T> s = copy(sinks);
    std::vector<T> out(queries), lse(p.heads * p.query_length), low(lse.size()), delta(lse.size());
    std::vector<T> grad_query(queries), grad_key(keys), grad_value(keys);
    p.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    p.query = q.data();
    p.key = k.data();
    p.value = v.data();
    p.out = out.data();
    p.lse = lse.data();
    p.lse_low = low.data();
    if (with_bias) p.distance_bias = b.data();
    if (with_bias && with_sinks) p.sink_logits = s.data();
    params.grad_out = g.data();
    params.delta = delta.data();
    params.grad_query = grad_query.data();
    params.grad_key = grad_key.data();
    params.grad_value = grad_value.data();
    if (sizeof(T) == 8) {
      pycore::Parallel parallel;
      const auto forward = aligned(pycore::attention_forward_scratch(p, 1));
      if (!pycore::attention_forward(p, parallel, forward.get()).ok()) std::abort();
      const auto backward = aligned(pycore::attention_backward_scratch(params, 1));
      if (!pycore::attention_backward(params, parallel, backward.get()).ok()) std::abort();
    } else {
      const auto scratch = aligned(pycore::emulated_forward_scratch(p));
      if (!pycore::emulated_forward(p, draw(0, 1) ? scratch.get() : nullptr, nullptr).ok()) std::abort();
      if (!pycore::emulated_backward(params, nullptr, nullptr).ok()) std::abort();
    }
    return std::make_pair(Buffer(grad_value.begin(), grad_value.end()), Buffer(lse.begin(), lse.end()));
  };
  const auto expected = run(static_cast<double*>(nullptr)), actual = run(static_cast<float*>(nullptr));
  if (close("lse", actual.second, expected.second, 5e-7f) &&
      close("grad_value", actual.first, expected.first, with_bias ? 5e-6f : 1e-3f)) {
    return true;
  }
  std::fprintf(stderr, "in peaked problem %ld: %ld queries, %ld keys, bias %d, softcap %g\n", number, p.query_length,
               p.key_length, with_bias, p.softcap);
  return false;
}

// A problem's buffers for results, and its gradients' inputs.
struct Results {
  std::vector<char> out;
  Buffer lse, delta, grad_query, grad_key, grad_value;

  // Runs forward, with scratch if `split`, and backward.
  Results(const pycore::AttentionParams& problem, const void* grad_out, const pycore::AttentionStrides& strides,
          bool split) {
    pycore::AttentionBackwardParams params;
    pycore::AttentionParams& p = params.forward;
    p = problem;
    const int64_t rows = p.batch * p.heads * p.query_length, keys = p.batch * p.kv_heads * p.key_length;
    out.resize(rows * p.value_dim * pycore::dtype_size(p.dtype));
    lse.resize(rows);
    delta.resize(rows);
    grad_query.resize(rows * p.head_dim);
    grad_key.resize(keys * p.head_dim);
    grad_value.resize(keys * p.value_dim);
    p.out = out.data();
    p.lse = lse.data();
    params.grad_out = grad_out;
    params.grad_out_strides = strides;
    params.delta = delta.data();
    params.grad_query = grad_query.data();
    params.grad_key = grad_key.data();
    params.grad_value = grad_value.data();
    const auto scratch = aligned(pycore::emulated_forward_scratch(p));
    if (!pycore::emulated_forward(p, split ? scratch.get() : nullptr, nullptr).ok()) std::abort();
    if (!pycore::emulated_backward(params, nullptr, nullptr).ok()) std::abort();
  }
};

// Whether `count` numbers are the same, to the bit.
bool same_bits(const float* one, const float* other, int64_t count) {
  return std::memcmp(one, other, count * sizeof(float)) == 0;
}

// Rows of a problem again in other company: the same bits. And what is not finite reaches only rows that keep it.
bool compare_bits(int64_t number) {
  pycore::AttentionParams p;
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  p.dtype = dtypes[draw(0, 2)];
  p.batch = 2;
  p.kv_heads = draw(1, 2);
  p.heads = p.kv_heads * draw(1, 4);
  p.query_length = draw(2, 140);
  p.key_length = draw(p.query_length, draw(0, 3) ? 300 : 2400);
  p.head_dim = draw(0, 1) ? 64 : draw(3, 80);
  p.value_dim = p.head_dim;
  p.scale = 0.3;
  p.schedule.kind = draw(0, 1) ? ScheduleKind::kCausal : ScheduleKind::kLambda;
  if (p.schedule.kind == ScheduleKind::kLambda) {
    p.schedule.sink_size = draw(0, 100);
    p.schedule.window_size = draw(1, 1300);
  }
  emulation::emulation.shared_limit = draw(0, 9) ? 227 << 10 : 24 << 10;
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
  if (draw(0, 3) == 0) p.softcap = 5;
  const auto strides = [](int64_t heads, int64_t length, int64_t channels) {
    return pycore::AttentionStrides{heads * length * channels, length * channels, channels};
  };
  p.query_strides = strides(p.heads, p.query_length, p.head_dim);
  p.key_strides = p.value_strides = strides(p.kv_heads, p.key_length, p.head_dim);
  const int64_t query_count = p.batch * p.heads * p.query_length * p.head_dim;
  const auto query = stored(normal(query_count), p.dtype), grad_out = stored(normal(query_count), p.dtype);
  Buffer keys = normal(p.batch * p.kv_heads * p.key_length * p.head_dim), values = keys;
  const std::vector<int64_t> lengths = {p.key_length, draw(p.query_length, p.key_length)};
  // Of batch row 1 the newest key, or its value, may hold NaN: only rows that see it may be reached.
  const int64_t newest = lengths[1] - 1, poisoned = draw(0, 2);
  for (int64_t h = 0; h < p.kv_heads && poisoned > 0; ++h) {
    std::fill_n((poisoned == 1 ? keys : values).begin() + ((p.kv_heads + h) * p.key_length + newest) * p.head_dim,
                p.head_dim, draw(0, 1) ? NAN : INFINITY);
  }
  const auto key = stored(keys, p.dtype), value = stored(values, p.dtype);
  p.query = query.data();
  p.key = key.data();
  p.value = value.data();
  p.key_lengths = lengths.data();
  emulation::emulation.reversed = draw(0, 1);
  const Results whole(p, grad_out.data(), p.query_strides, false);

  const int64_t b = draw(0, 1), count = draw(0, 2) == 0 ? 1 : draw(1, p.query_length);
  const int64_t first = draw(0, 1) ? p.query_length - count : draw(0, p.query_length - count);
  const int64_t size = pycore::dtype_size(p.dtype);
  const auto report = [&](const char* what, bool split) {
    std::fprintf(stderr, "failed: %s of rows %ld to %ld has other bits alone%s, in problem %ld\n", what, first,
                 first + count - 1, split ? " and split" : "", number);
    return false;
  };
  for (const bool split : {false, true}) {
    emulation::emulation.reversed = draw(0, 1);
    pycore::AttentionParams some = p;
    const auto move = [&](const void* data, int64_t elements) {
      return static_cast<const char*>(data) + elements * size;
    };
    const int64_t query_offset = b * p.query_strides.batch + first * p.query_strides.row;
    some.batch = 1;
    some.query_length = count;
    some.query = move(p.query, query_offset);
    some.key = move(p.key, b * p.key_strides.batch);
    some.value = move(p.value, b * p.value_strides.batch);
    // The last query stands at the last key: keys after it are cut off.
    const int64_t length = p.key_lengths[b] - (p.query_length - first - count);
    some.key_lengths = &length;
    const Results alone(some, move(grad_out.data(), query_offset), p.query_strides, split);
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t row = (b * p.heads + h) * p.query_length + first;
      const int64_t bytes = p.value_dim * size;
      if (std::memcmp(whole.out.data() + row * bytes, alone.out.data() + h * count * bytes, count * bytes) != 0 ||
          !same_bits(whole.lse.data() + row, alone.lse.data() + h * count, count)) {
        return report("out", split);
      }
      if (poisoned > 0 && b == 1) continue;  // a NaN has many bits
      if (!same_bits(whole.grad_query.data() + row * p.head_dim, alone.grad_query.data() + h * count * p.head_dim,
                     count * p.head_dim)) {
        return report("grad_query", split);
      }
    }
    if (count < p.query_length || (poisoned > 0 && b == 1)) continue;
    const int64_t kept = p.kv_heads * p.key_length * p.head_dim;
    if (!same_bits(whole.grad_key.data() + b * kept, alone.grad_key.data(), kept)) return report("grad_key", split);
    if (!same_bits(whole.grad_value.data() + b * kept, alone.grad_value.data(), kept)) {
      return report("grad_value", split);
    }
  }
  if (poisoned == 0) return true;
  const Buffer out = loaded(whole.out, p.dtype);
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t i = 0; i < p.query_length; ++i) {
      const int64_t row = (p.heads + h) * p.query_length + i;
      const auto finite = [](const float* x, int64_t count) {
        return std::all_of(x, x + count, [](float number) { return std::isfinite(number); });
      };
      const bool sees = i == p.query_length - 1;
      // An infinite key may have no weight.
      const bool reached = !finite(&out[row * p.value_dim], p.value_dim);
      if (sees ? reached || poisoned == 1 : !reached && finite(&whole.grad_query[row * p.head_dim], p.head_dim)) {
        continue;
      }
      std::fprintf(stderr, "failed: what is not finite in a key's %s %s row %ld, in problem %ld\n",
                   poisoned == 1 ? "row" : "value", sees ? "does not reach" : "reaches", i, number);
      return false;
    }
  }
  return true;
}

// So many segments that one walk lists them: a few, far apart, that a query visits. The same bits as without splitting.
bool compare_listed(int64_t number) {
  pycore::AttentionParams p;
  p.batch = p.heads = p.kv_heads = 1;
  p.query_length = draw(1, 3);
  p.key_length = draw(140000, 150000);
  p.head_dim = p.value_dim = 8;
  p.scale = 0.3;
  p.schedule.kind = ScheduleKind::kKeySubset;
  p.schedule.key_words = (p.key_length + 63) / 64;
  std::vector<uint64_t> words(p.schedule.key_words);
  for (int64_t n = draw(0, 6); n > 0; --n) words[draw(0, p.schedule.key_words - 1)] = ~uint64_t{0};
  p.schedule.keys = words.data();
  p.query_strides.row = p.key_strides.row = p.value_strides.row = p.head_dim;
  const Buffer query = normal(p.query_length * p.head_dim), key = normal(p.key_length * p.head_dim);
  p.query = query.data();
  p.key = p.value = key.data();
  emulation::emulation.shared_limit = 227 << 10;
  Buffer out[2], lse[2];
  const int64_t bytes = pycore::emulated_forward_scratch(p);
  const auto scratch = aligned(bytes);
  std::memset(scratch.get(), 0xff, bytes);
  for (int split = 0; split < 2; ++split) {
    out[split].resize(query.size());
    lse[split].resize(p.query_length);
    p.out = out[split].data();
    p.lse = lse[split].data();
    if (!pycore::emulated_forward(p, split ? scratch.get() : nullptr, nullptr).ok()) std::abort();
  }
  if (same_bits(out[0].data(), out[1].data(), out[0].size()) &&
      same_bits(lse[0].data(), lse[1].data(), lse[0].size()) && bytes > 0) {
    return true;
  }
  std::fprintf(stderr, "failed: listed segments give other bits, in problem %ld\n", number);
  return false;
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
  params.correction_rows = params.probability_stride ? rows.heads : 1;
  Buffer added(params.correction_rows * params.probability_length), emulated(added.size());
  params.correction = added.data();
  pycore::Parallel parallel;
  parallel.threads = 1;
  parallel.run = [](void*, int64_t, void (*body)(void*, int64_t), void* argument) { body(argument, 0); };
  const auto scratch = aligned(pycore::attention_blocks_scratch(params, 1));
  if (!pycore::attention_blocks(params, parallel, scratch.get()).ok()) std::abort();
  params.blocks = actual.data();
  if (!pycore::emulated_blocks(params, nullptr).ok()) std::abort();
  params.correction = emulated.data();
  if (!pycore::emulated_correction(params, nullptr).ok()) std::abort();
  if (expected == actual && added == emulated) return true;
  std::fprintf(stderr, "failed: other blocks or corrections than the CPU's, in round %ld\n", number);
  return false;
}

}  // namespace

// The number of problems, 60 unless given.
int main(int count, char** arguments) {
  const int64_t problems = count > 1 ? std::atoll(arguments[1]) : 60;
  for (int64_t n = 0; n < problems; ++n) {
    if (!compare(n) || !compare_peaked(n) || !compare_bits(n) || !compare_blocks(n) ||
        (n % 5 == 0 && !compare_listed(n)))
      return 1;
  }
  std::printf("%ld problems\n", problems);
  return 0;
}
