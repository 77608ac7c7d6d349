// SPDX-License-Identifier: Apache-2.0
// The log-sum-exp of rows of logits, and its gradients. Without gradients a thread takes a block of rows through all
// segments, one at a time in its scratch. With them, a block's logits are kept until its lse is there, so that no
// product is done twice: a few megabytes whatever the number of rows. Where columns are reduced too, a block of rows
// and a segment is an item, whose parts of both wait in scratch until some hundred rows are there.
#include <pycore/float_environment.h>
#include <pycore/portable_math.h>

#include "choose.h"

namespace pycore {

using namespace pairwise;

namespace {

constexpr int64_t kChunkFloats = 1 << 22;  // of logits kept at a time, where kPairwiseRows rows allow
constexpr int64_t kMostChunkRows = 8 * kPairwiseRows;
constexpr int64_t kStrip = 256;  // columns of an item of grad_y
constexpr double kNothing = -HUGE_VAL;

// The segments of a row so far. NaN stays.
struct Merged {
  double max = kNothing, sum = 0;
  void add(double largest, double part) {
    if (largest > max) {
      sum = (max == kNothing ? sum : sum * portable_exp(max - largest)) + part;
      max = largest;
    } else {
      sum += largest == kNothing ? part : part * portable_exp(largest - max);
    }
  }
  double lse() const {
    if (sum != sum) return max == HUGE_VAL ? HUGE_VAL : sum;
    return sum > 0 ? max + portable_log(sum) : kNothing;
  }
};

// What a segment adds to a row's.
struct SegmentState {
  double max, sum, total, target;
};

struct Job {
  const PairwiseLogsumexpParams& params;
  const PairwiseKernels& kernels;
  int64_t size = element_size(params.dtype);

  int64_t segments() const { return parts(params.columns, kPairwiseSegment); }
  const void* bias(int64_t batch, int64_t column) const {
    if (!params.y_bias) return nullptr;
    return static_cast<const char*>(params.y_bias) + (batch * params.bias_batch_stride + column) * size;
  }
  int64_t target(int64_t batch, int64_t row) const {
    return params.target ? params.target[batch * params.rows + row] : -1;
  }
  char* line(char* logits, int64_t row) const { return logits + row * kSegmentStride * size; }

  // Logits of some rows and a segment, kSegmentStride apart.
  void logits(int64_t batch, Range rows, Range columns, char* out, char* scratch) const {
    kernels.scores(params, batch, rows, columns, out, scratch);
    for (int64_t r = 0; r < rows.count(); ++r) {
      kernels.logits(line(out, r), columns.count(), params.scale, bias(batch, columns.begin), params.softcap);
    }
  }
  double total(const char* row, int64_t count) const {
    if (!params.logit_sum) return 0;
    Number sum(params.dtype);
    kernels.total(row, count, &sum.memory);
    return sum.get();
  }
  double target_logit(const char* row, Range columns, int64_t target) const {
    const bool here = target >= columns.begin && target < columns.end;
    return here ? number(row, params.dtype, target - columns.begin) : 0;
  }
  SegmentState segment(int64_t batch, int64_t row, Range columns, const char* logits) const {
    Number largest(params.dtype), sum(params.dtype);
    kernels.reduce(logits, columns.count(), &largest.memory, &sum.memory);
    return {largest.get(), sum.get(), total(logits, columns.count()),
            target_logit(logits, columns, target(batch, row))};
  }
  void finish(int64_t batch, int64_t row, double lse, double target, double sum) const {
    const int64_t at = batch * params.rows + row;
    set_number(params.lse, params.dtype, at, lse);
    if (params.target_logit) set_number(params.target_logit, params.dtype, at, target);
    if (params.logit_sum) set_number(params.logit_sum, params.dtype, at, sum);
  }
};

// A row's results while its segments pass.
struct RowState {
  Merged merged;
  double target = 0, sum = 0;
  void add(const SegmentState& segment) {
    merged.add(segment.max, segment.sum);
    sum += segment.total;
    target += segment.target;
  }
};

// Of rows whose segments are all there, in states [rows][segments].
void finish_rows(const Job& job, const SegmentState* states, int64_t batch, Range rows, double* lse) {
  const FixedFloats fixed;
  const int64_t segments = job.segments();
  for (int64_t r = 0; r < rows.count(); ++r) {
    RowState state;
    for (int64_t s = 0; s < segments; ++s) state.add(states[r * segments + s]);
    lse[r] = state.merged.lse();
    job.finish(batch, rows.begin + r, lse[r], state.target, state.sum);
  }
}

// Of a call's scratch; counts bytes where there is none yet.
struct Pieces {
  char* memory;
  int64_t at = 0;
  char* take(int64_t bytes) {
    char* const piece = memory + at;
    at = size_sum(at, aligned(bytes));
    return piece;
  }
};

int64_t forward_bytes(const Job& job) {
  return aligned(job.kernels.scratch) + aligned(kPairwiseRows * kSegmentStride * job.size) +
         aligned(kPairwiseRows * static_cast<int64_t>(sizeof(RowState)));
}

void forward_item(const Job& job, int64_t batch, Range rows, char* memory) {
  char* const logits = memory + aligned(job.kernels.scratch);
  RowState* const states = reinterpret_cast<RowState*>(logits + aligned(kPairwiseRows * kSegmentStride * job.size));
  for (int64_t r = 0; r < rows.count(); ++r) states[r] = RowState{};
  for (int64_t s = 0; s < job.segments(); ++s) {
    const Range columns = part(s, kPairwiseSegment, job.params.columns);
    job.logits(batch, rows, columns, logits, memory);
    for (int64_t r = 0; r < rows.count(); ++r) {
      states[r].add(job.segment(batch, rows.begin + r, columns, job.line(logits, r)));
    }
  }
  for (int64_t r = 0; r < rows.count(); ++r) {
    job.finish(batch, rows.begin + r, states[r].merged.lse(), states[r].target, states[r].sum);
  }
}

// ---- rows and columns ----------------------------------------------------------------------------------------------

struct Both {
  int64_t blocks;        // of rows, that wait at a time
  SegmentState* states;  // [rows][segments]
  double* row_lse;       // [rows]
  char* largest;         // [blocks][segments][kPairwiseSegment]
  char* sums;            // as largest
  Merged* columns;       // [segments][kPairwiseSegment]
  char* threads;
  int64_t thread_bytes;
  int64_t bytes;
};

Both lay_out_both(const Job& job, int64_t threads, char* memory) {
  const int64_t segments = job.segments(), columns = segments * kPairwiseSegment;
  Both both;
  const int64_t all = std::max<int64_t>(parts(job.params.rows, kPairwiseRows), 1);
  both.blocks = std::min(all, std::max<int64_t>(8, parts(4 * threads, std::max<int64_t>(segments, 1))));
  const int64_t rows = both.blocks * kPairwiseRows;
  Pieces pieces{memory};
  both.states = reinterpret_cast<SegmentState*>(
      pieces.take(size_product({rows, segments, static_cast<int64_t>(sizeof(SegmentState))})));
  both.row_lse = reinterpret_cast<double*>(pieces.take(rows * 8));
  both.largest = pieces.take(size_product({both.blocks, columns, job.size}));
  both.sums = pieces.take(size_product({both.blocks, columns, job.size}));
  both.columns = reinterpret_cast<Merged*>(pieces.take(size_product({columns, static_cast<int64_t>(sizeof(Merged))})));
  both.thread_bytes = aligned(job.kernels.scratch) + aligned(kPairwiseRows * kSegmentStride * job.size);
  both.threads = pieces.take(size_product({threads, both.thread_bytes}));
  both.bytes = pieces.at;
  return both;
}

// Some blocks of rows through all segments.
void both_items(const Job& job, const Both& both, const Parallel& parallel, int64_t batch, Range rows) {
  const int64_t segments = job.segments(), blocks = parts(rows.count(), kPairwiseRows);
  for_each_item(parallel, segments * blocks, [&](int64_t slot, int64_t item) {
    const int64_t s = item / blocks, block = item % blocks;
    const Range columns = part(s, kPairwiseSegment, job.params.columns);
    const Range of = part(block, kPairwiseRows, rows.count()), mine = {rows.begin + of.begin, rows.begin + of.end};
    char* const scratch = both.threads + slot * both.thread_bytes;
    char* const logits = scratch + aligned(job.kernels.scratch);
    job.logits(batch, mine, columns, logits, scratch);
    for (int64_t r = 0; r < mine.count(); ++r) {
      both.states[(of.begin + r) * segments + s] = job.segment(batch, mine.begin + r, columns, job.line(logits, r));
    }
    const int64_t at = (block * segments + s) * kPairwiseSegment * job.size;
    job.kernels.reduce_columns(logits, mine.count(), columns.count(), both.largest + at, both.sums + at);
  });
  finish_rows(job, both.states, batch, rows, both.row_lse);
  for_each_item(parallel, segments, [&](int64_t, int64_t s) {
    const int64_t count = part(s, kPairwiseSegment, job.params.columns).count();
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = (block * segments + s) * kPairwiseSegment + c;
        both.columns[s * kPairwiseSegment + c].add(number(both.largest, job.params.dtype, at),
                                                   number(both.sums, job.params.dtype, at));
      }
    }
  });
}

void rows_and_columns(const Job& job, const Parallel& parallel, char* memory) {
  const PairwiseLogsumexpParams& params = job.params;
  const Both both = lay_out_both(job, parallel.threads, memory);
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    std::fill_n(both.columns, params.columns, Merged{});
    for (int64_t begin = 0; begin < params.rows; begin += both.blocks * kPairwiseRows) {
      both_items(job, both, parallel, batch, {begin, std::min(begin + both.blocks * kPairwiseRows, params.rows)});
    }
    const FixedFloats fixed;
    for (int64_t c = 0; c < params.columns; ++c) {
      set_number(params.column_lse, params.dtype, batch * params.columns + c, both.columns[c].lse());
    }
  }
}

// ---- with gradients -------------------------------------------------------------------------------------------------

struct Chunk {
  int64_t rows;          // of a chunk
  int64_t row_part;      // of an item
  char* logits;          // [segments][rows][kSegmentStride]
  SegmentState* states;  // [rows][segments]
  double* row_lse;       // [rows]
  char* bias;            // [segments][kSegmentStride]: of grad_bias
  char* threads;
  int64_t thread_bytes;
  int64_t bytes;
};

Chunk lay_out(const Job& job, int64_t threads, char* memory) {
  const int64_t segments = std::max<int64_t>(job.segments(), 1);
  Chunk chunk;
  const int64_t fit = kChunkFloats / kSegmentStride / segments / kPairwiseRows * kPairwiseRows;
  const int64_t all = std::max<int64_t>(parts(job.params.rows, kPairwiseRows), 1) * kPairwiseRows;
  chunk.rows = std::min(std::clamp(fit, 2 * kPairwiseRows, kMostChunkRows), all);
  const int64_t items = segments * parts(std::min(chunk.rows, std::max<int64_t>(job.params.rows, 1)), kPairwiseRows);
  chunk.row_part = items < 2 * threads ? kPairwiseRows / 2 : kPairwiseRows;
  Pieces pieces{memory};
  chunk.logits = pieces.take(size_product({segments, chunk.rows, kSegmentStride, job.size}));
  chunk.states = reinterpret_cast<SegmentState*>(
      pieces.take(size_product({segments, chunk.rows, static_cast<int64_t>(sizeof(SegmentState))})));
  chunk.row_lse = reinterpret_cast<double*>(pieces.take(chunk.rows * 8));
  chunk.bias = pieces.take(size_product({segments, kSegmentStride, job.size}));
  chunk.thread_bytes = aligned(job.kernels.scratch);
  chunk.threads = pieces.take(size_product({threads, chunk.thread_bytes}));
  chunk.bytes = pieces.at;
  return chunk;
}

void chunk_logits(const Job& job, const Chunk& chunk, const Parallel& parallel, int64_t batch, Range rows) {
  const int64_t segments = job.segments(), row_parts = parts(rows.count(), chunk.row_part);
  for_each_item(parallel, segments * row_parts, [&](int64_t slot, int64_t item) {
    const int64_t s = item / row_parts;
    const Range columns = part(s, kPairwiseSegment, job.params.columns);
    const Range of = part(item % row_parts, chunk.row_part, rows.count());
    char* const logits = job.line(chunk.logits, s * chunk.rows + of.begin);
    const Range mine = {rows.begin + of.begin, rows.begin + of.end};
    job.logits(batch, mine, columns, logits, chunk.threads + slot * chunk.thread_bytes);
    for (int64_t r = 0; r < mine.count(); ++r) {
      chunk.states[(of.begin + r) * segments + s] = job.segment(batch, mine.begin + r, columns, job.line(logits, r));
    }
  });
}

void chunk_columns(const Job& job, const Chunk& chunk, const Parallel& parallel, int64_t batch, Range rows) {
  const PairwiseLogsumexpParams& params = job.params;
  constexpr int64_t kStrips = kPairwiseSegment / kStrip;
  for_each_item(parallel, job.segments() * kStrips, [&](int64_t, int64_t item) {
    const int64_t s = item / kStrips, first = item % kStrips * kStrip;
    const int64_t begin = s * kPairwiseSegment + first;
    const int64_t count = std::min(kStrip, params.columns - begin);
    if (count <= 0) return;
    char* const bias = chunk.bias + (s * kSegmentStride + first) * job.size;
    const int64_t of_columns = (batch * params.columns + begin) * job.size;
    const char* const column_weights =
        params.column_weights ? static_cast<const char*>(params.column_weights) + of_columns : nullptr;
    const char* const column_lse =
        params.column_weights ? static_cast<const char*>(params.column_lse) + of_columns : nullptr;
    for (int64_t r = 0; r < rows.count(); ++r) {
      const int64_t at = batch * params.rows + rows.begin + r;
      double w[4];
      for (int i = 0; i < 4; ++i) w[i] = number(params.weights, params.dtype, at * 4 + i);
      char* const row = job.line(chunk.logits, s * chunk.rows + r) + first * job.size;
      if (!column_weights && w[0] == 0 && w[1] == 0 && w[2] == 0 && w[3] == 0) {
        std::memset(row, 0, static_cast<size_t>(count * job.size));
        continue;
      }
      const double lse = chunk.row_lse[r];
      const double weights[3] = {w[1] == 0 ? w[0] : w[0] + w[1] * lse, w[2], w[3]};
      const int64_t target = job.target(batch, rows.begin + r);
      const bool here = target >= begin && target < begin + count;
      job.kernels.gradient(row, count, lse, weights, here ? target - begin : -1, params.scale, params.softcap,
                           column_weights, column_lse, bias);
    }
    if (!params.grad_y) return;
    char* const out = static_cast<char*>(params.grad_y) + (batch * params.columns + begin) * params.dim * job.size;
    for (int64_t r = 0; r < rows.count(); r += kPairwiseRows) {
      const Range block = {rows.begin + r, rows.begin + std::min(r + kPairwiseRows, rows.count())};
      job.kernels.columns_product(params, batch, block, count,
                                  job.line(chunk.logits, s * chunk.rows + r) + first * job.size, out);
    }
  });
}

void chunk_rows(const Job& job, const Chunk& chunk, const Parallel& parallel, int64_t batch, Range rows) {
  const PairwiseLogsumexpParams& params = job.params;
  const int64_t row_parts = parts(rows.count(), chunk.row_part), channels = parts(params.dim, kRowChannels);
  for_each_item(parallel, row_parts * channels, [&](int64_t slot, int64_t item) {
    const Range of = part(item / channels, chunk.row_part, rows.count());
    const Range depth = part(item % channels, kRowChannels, params.dim);
    char* const out = static_cast<char*>(params.grad_x) +
                      ((batch * params.rows + rows.begin + of.begin) * params.dim + depth.begin) * job.size;
    for (int64_t s = 0; s < job.segments(); ++s) {
      job.kernels.rows_product(params, batch, of.count(), part(s, kPairwiseSegment, params.columns), depth,
                               job.line(chunk.logits, s * chunk.rows + of.begin), out,
                               chunk.threads + slot * chunk.thread_bytes);
    }
  });
}

void zero(void* memory, int64_t bytes) {
  if (memory && bytes > 0) std::memset(memory, 0, static_cast<size_t>(bytes));
}

void with_gradients(const Job& job, const Parallel& parallel, char* memory) {
  const PairwiseLogsumexpParams& params = job.params;
  const Chunk chunk = lay_out(job, parallel.threads, memory);
  zero(params.grad_x, params.batch * params.rows * params.dim * job.size);
  zero(params.grad_y, params.batch * params.columns * params.dim * job.size);
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    zero(chunk.bias, job.segments() * kSegmentStride * job.size);
    for (int64_t begin = 0; begin < params.rows; begin += chunk.rows) {
      const Range rows = {begin, std::min(begin + chunk.rows, params.rows)};
      chunk_logits(job, chunk, parallel, batch, rows);
      finish_rows(job, chunk.states, batch, rows, chunk.row_lse);
      chunk_columns(job, chunk, parallel, batch, rows);
      if (params.grad_x) chunk_rows(job, chunk, parallel, batch, rows);
    }
    for (int64_t s = 0; params.grad_bias && s < job.segments(); ++s) {
      const Range columns = part(s, kPairwiseSegment, params.columns);
      std::memcpy(static_cast<char*>(params.grad_bias) + (batch * params.columns + columns.begin) * job.size,
                  chunk.bias + s * kSegmentStride * job.size, static_cast<size_t>(columns.count() * job.size));
    }
  }
}

}  // namespace

int64_t pairwise_logsumexp_scratch(const PairwiseLogsumexpParams& params, int64_t threads) {
  const PairwiseKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return 0;
  const Job job{params, *kernels};
  if (params.weights) return lay_out(job, threads, nullptr).bytes;
  if (params.column_lse) return lay_out_both(job, threads, nullptr).bytes;
  return size_product({threads, forward_bytes(job)});
}

Status pairwise_logsumexp(const PairwiseLogsumexpParams& params, const Parallel& parallel, void* scratch) {
  const PairwiseKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const Job job{params, *kernels};
  char* const memory = static_cast<char*>(scratch);
  const Parallel pool = limited(parallel, work_of(params), kSerialWork);
  if (params.weights) {
    with_gradients(job, pool, memory);
    return {};
  }
  if (params.column_lse) {
    rows_and_columns(job, pool, memory);
    return {};
  }
  const int64_t rows = item_rows(params.batch, params.rows, pool.threads), items = parts(params.rows, rows);
  const int64_t bytes = forward_bytes(job);
  for_each_item(pool, params.batch * items, [&](int64_t slot, int64_t item) {
    forward_item(job, item / items, part(item % items, rows, params.rows), memory + slot * bytes);
  });
  return {};
}

}  // namespace pycore
