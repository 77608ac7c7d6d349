// SPDX-License-Identifier: Apache-2.0
// The best k of each row, by scores and by bits, and the distances of given pairs.
#include <pycore/vq/vq.h>

#include <cmath>

#include "choose.h"

namespace pycore {

using namespace pairwise;

namespace {

#include "insert.inl.h"

constexpr int64_t kFewRows = 8;         // whose scores say whether y is finite
constexpr int64_t kMostHeld = 1 << 16;  // entries of an item's lists, where its rows allow
constexpr int64_t kTopkRows = 288;      // of an item, at most: turning y into columns is shared by them
constexpr int64_t kRowFloats = 1 << 17,
                  kScoreFloats = kPairwiseRows * kPairwiseSegment;  // of an item: the second cache

// Rows of an item, at most.
int64_t most_rows(const PairwiseTopkParams& params) {
  const int64_t by_cache = std::clamp<int64_t>(kRowFloats / std::max<int64_t>(params.dim, 1), kPairwiseRows, kTopkRows);
  return std::clamp<int64_t>(kMostHeld / std::max<int64_t>(params.k, 1), 1, by_cache);
}

int64_t topk_bytes(const PairwiseTopkParams& params, const PairwiseKernels& kernels) {
  const int64_t size = element_size(params.dtype);
  return aligned(kernels.scratch) + aligned(kTopkRows * kSegmentStride * size) + kTopkRows * 8;
}

// By integers, so that no compiler reasons about NaN.
bool all_finite(const float* x, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (bits_of_float(x[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  return bad == 0;
}

bool all_finite(const double* x, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good = good && std::isfinite(x[i]);
  return good;
}

bool row_finite(const PairwiseParams& params, const PairwiseRows& rows, int64_t batch, int64_t row) {
  return params.dtype == DType::kFloat64 ? all_finite(rows.at<double>(batch, row), params.dim)
                                         : all_finite(rows.at<float>(batch, row), params.dim);
}

void note(std::atomic<int64_t>* lowest, int64_t index) {
  int64_t seen = lowest->load(std::memory_order_relaxed);
  while (index < seen && !lowest->compare_exchange_weak(seen, index, std::memory_order_relaxed)) {
  }
}

// Notes rows with a NaN or an infinity. Rows that every batch shares are looked at once.
void check_rows(const PairwiseParams& params, const PairwiseRows& rows, int64_t count, const int64_t* lengths,
                const Parallel& parallel, std::atomic<int64_t>* fault) {
  const bool shared = rows.batch_stride == 0 && !lengths;
  const int64_t batches = shared ? std::min<int64_t>(params.batch, 1) : params.batch, blocks = parts(count, 256);
  for_each_item(parallel, batches * blocks, [&](int64_t, int64_t item) {
    const int64_t batch = item / blocks;
    const Range block = part(item % blocks, 256, lengths ? std::min(lengths[batch], count) : count);
    for (int64_t row = block.begin; row < block.end; ++row) {
      if (!row_finite(params, rows, batch, row)) return note(fault, batch * count + row);
    }
  });
}

// The lists of some rows, k entries apart.
struct Lists {
  char* scores;
  int64_t *indices, *held;
};

int64_t rows_of(const PairwiseTopkParams& params, int64_t batch) {
  return params.x_lengths ? std::min(params.x_lengths[batch], params.rows) : params.rows;
}

int64_t columns_of(const PairwiseTopkParams& params, int64_t batch) {
  return params.y_lengths ? std::min(params.y_lengths[batch], params.columns) : params.columns;
}

// A row's columns of one segment, whose scores are in `row`, join its list. The largest come first, so distances change
// their sign.
void select(const PairwiseTopkParams& params, const PairwiseKernels& kernels, char* row, Range columns, int64_t r,
            const Lists& lists) {
  const int64_t k = params.k;
  if (params.euclidean) kernels.logits(row, columns.count(), -1, nullptr, 0);
  kernels.select(row, columns.count(), columns.begin, k, lists.held + r,
                 lists.scores + r * k * element_size(params.dtype), lists.indices + r * k);
}

bool finite_sum(const PairwiseTopkParams& params, const PairwiseKernels& kernels, const char* row, int64_t count) {
  Number sum(params.dtype);
  kernels.total(row, count, &sum.memory);
  return std::isfinite(sum.get());
}

// A segment of few rows whose lists are full: only columns that may join are scored. False where too many may, or where
// bounds are none.
bool select_bounded(const PairwiseTopkParams& params, const PairwiseKernels& kernels, int64_t batch, Range rows,
                    Range columns, char* scores, char* memory, const Lists& lists) {
  constexpr int64_t kMost = 32;  // a column scored alone costs about as much as sixteen
  const int64_t size = element_size(params.dtype), k = params.k;
  for (int64_t r = 0; r < rows.count(); ++r) {
    if (lists.held[r] < k) return false;
  }
  kernels.bounds(params, batch, rows, columns, scores);
  char* const one = scores + kBoundedRows * kSegmentStride * size;
  const auto row = [&](int64_t r) { return scores + r * kSegmentStride * size; };
  for (int64_t r = 0; r < rows.count(); ++r) {
    if (!finite_sum(params, kernels, row(r), columns.count())) return false;
  }
  for (int64_t r = 0; r < rows.count(); ++r) {
    const auto least = [&] { return number(lists.scores, params.dtype, r * k + k - 1); };
    int64_t count = 0;
    for (int64_t c = 0; (c = kernels.next(row(r), c, columns.count(), least())) < columns.count(); ++c) {
      const int64_t column = columns.begin + c;
      if (++count > kMost) {  // the rest at once
        const Range rest = {column, columns.end};
        kernels.scores(params, batch, {rows.begin + r, rows.begin + r + 1}, rest, one, memory);
        select(params, kernels, one, rest, r, lists);
        break;
      }
      kernels.scores(params, batch, {rows.begin + r, rows.begin + r + 1}, {column, column + 1}, one, memory);
      select(params, kernels, one, {column, column + 1}, r, lists);
    }
  }
  return true;
}

// Columns join the lists, as many at a time as scores fit. What does not count is not read. `suspicious`, if it is
// asked for, becomes true where a row of y has a NaN or an infinity, and maybe elsewhere.
void scan(const PairwiseTopkParams& params, const PairwiseKernels& kernels, int64_t batch, Range all, Range columns,
          char* memory, const Lists& lists, std::atomic<bool>* suspicious) {
  const int64_t size = element_size(params.dtype);
  char* const scores = memory + aligned(kernels.scratch);
  const Range rows = {all.begin, std::max(all.begin, std::min(all.end, rows_of(params, batch)))};
  const int64_t end = std::min(columns.end, columns_of(params, batch));
  const bool bounded = kernels.bounds && !params.euclidean && rows.count() <= kBoundedRows && params.dim > 0 &&
                       params.dim <= kMostBoundedDim;
  for (int64_t r = 0; r < all.count(); ++r) lists.held[r] = 0;
  if (rows.count() == 0) return;
  const int64_t step = std::clamp(kScoreFloats / rows.count() / kKeyTile * kKeyTile, kKeyTile, kPairwiseSegment);
  for (int64_t begin = columns.begin; begin < end; begin += step) {
    const Range segment = {begin, std::min(begin + step, end)};
    if (bounded && select_bounded(params, kernels, batch, rows, segment, scores, memory, lists)) continue;
    kernels.scores(params, batch, rows, segment, scores, memory);
    for (int64_t r = 0; r < rows.count(); ++r) {
      char* const row = scores + r * kSegmentStride * size;
      if (suspicious && !finite_sum(params, kernels, row, segment.count())) {
        suspicious->store(true, std::memory_order_relaxed);
      }
      select(params, kernels, row, segment, r, lists);
    }
  }
}

// From lists to results.
void finish(const PairwiseTopkParams& params, int64_t batch, Range all, const int64_t* held) {
  const int64_t k = params.k, wanted = std::min(k, columns_of(params, batch));
  char* const out = static_cast<char*>(params.scores);
  for (int64_t row = all.begin; row < all.end; ++row) {
    const int64_t n = held[row - all.begin], at = (batch * params.rows + row) * k;
    const bool overflown = n > 0 && !(std::isfinite(number(out, params.dtype, at)) &&
                                      std::isfinite(number(out, params.dtype, at + n - 1)));
    if (row < rows_of(params, batch) && (n < wanted || overflown)) {
      note(&params.faults->score_row, batch * params.rows + row);
    }
    for (int64_t i = 0; params.euclidean && i < n; ++i) {
      set_number(out, params.dtype, at + i, -number(out, params.dtype, at + i));
    }
    for (int64_t i = n; i < k; ++i) {
      set_number(out, params.dtype, at + i, params.euclidean ? HUGE_VAL : -HUGE_VAL);
      params.indices[at + i] = -1;
    }
  }
}

Lists result_lists(const PairwiseTopkParams& params, int64_t batch, int64_t row, int64_t* held) {
  const int64_t at = (batch * params.rows + row) * params.k;
  return {static_cast<char*>(params.scores) + at * element_size(params.dtype), params.indices + at, held};
}

template <class T>
void join(const Lists& from, int64_t rows, int64_t k, const Lists& to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < from.held[r]; ++i) {
      insert_largest(reinterpret_cast<const T*>(from.scores)[r * k + i], from.indices[r * k + i], k, to.held + r,
                     reinterpret_cast<T*>(to.scores) + r * k, to.indices + r * k);
    }
  }
}

// How the work of a call is cut: into blocks of rows, or where they are fewer than the threads ask for, into columns
// too, whose lists join in order.
struct Cut {
  int64_t rows, items, parts, part_columns, thread_bytes, list_bytes;

  Cut(const PairwiseTopkParams& params, const PairwiseKernels& kernels, int64_t threads) {
    const int64_t most = most_rows(params), segments = pairwise::parts(params.columns, kPairwiseSegment);
    const int64_t even = pairwise::parts(params.rows, std::max<int64_t>(pairwise::parts(params.rows, most), 1));
    rows = std::clamp<int64_t>(pairwise::parts(even, kGroupRows) * kGroupRows, 1, most);
    items = pairwise::parts(params.rows, rows);
    int64_t blocks = size_product({params.batch, items}), wanted = 1;
    const int64_t pieces = threads == 1 || params.rows <= kFewRows ? threads : 2 * threads;
    if (blocks > 0 && blocks < pieces) {
      wanted = pairwise::parts(pieces, blocks);
      if (segments < 2 * wanted && params.rows > kFewRows) {  // columns are too few to be cut
        rows = std::min(item_rows(params.batch, params.rows, threads), most);
        items = pairwise::parts(params.rows, rows);
        blocks = size_product({params.batch, items});
        wanted = blocks < threads ? pairwise::parts(threads, blocks) : 1;
      }
    }
    part_columns = pairwise::parts(segments, wanted) * kPairwiseSegment;
    parts = std::max<int64_t>(part_columns > 0 ? pairwise::parts(params.columns, part_columns) : 1, 1);
    thread_bytes = topk_bytes(params, kernels);
    list_bytes = parts > 1 ? aligned(size_product({rows, params.k, 16})) + aligned(rows * 8) : 0;
  }
  int64_t bytes(const PairwiseTopkParams& params, int64_t threads) const {
    return size_sum(size_product({threads, thread_bytes}), size_product({params.batch, items, parts, list_bytes}));
  }
  Lists lists(char* memory, int64_t index, int64_t k) const {
    char* const at = memory + index * list_bytes;
    return {at, reinterpret_cast<int64_t*>(at + rows * k * 8), reinterpret_cast<int64_t*>(at + aligned(rows * k * 16))};
  }
};

// ---- distances in float32: the search that vq has
// ---------------------------------------------------------------------

bool searched_by_vq(const PairwiseTopkParams& params) {
  return params.euclidean && params.dtype == DType::kFloat32 && params.dim > 0;
}

// Of one batch; `count` rows of x against `columns` of y.
VqEncodeParams vq_params(const PairwiseTopkParams& params, int64_t batch, int64_t count, int64_t columns,
                         VqFaults* faults) {
  VqEncodeParams vq;
  vq.isa = params.isa;
  vq.dim = params.dim;
  vq.x.data = params.x.at<float>(batch, 0);
  vq.x.rows = count;
  vq.x.dims = 1;
  vq.x.shape[0] = count;
  vq.x.strides[0] = params.x.row_stride;
  vq.codebooks = params.y.at<float>(batch, 0);
  vq.code_stride = params.y.row_stride;
  vq.most_codes = columns;
  vq.topk = std::min(params.k, columns);
  vq.codes = params.indices + batch * params.rows * params.k;
  vq.faults = faults;
  return vq;
}

// [count, held] at the front of `indices` becomes [rows, k], -1 where there is none.
void spread(int64_t* indices, int64_t rows, int64_t k, int64_t count, int64_t held) {
  for (int64_t row = rows - 1; row >= 0; --row) {
    const int64_t n = row < count ? held : 0;
    for (int64_t i = k - 1; i >= n; --i) indices[row * k + i] = -1;
    for (int64_t i = n - 1; i >= 0; --i) indices[row * k + i] = indices[row * held + i];
  }
}

Status nearest(const PairwiseTopkParams& params, const Parallel& parallel, void* scratch) {
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    const int64_t count = params.x_lengths ? std::min(params.x_lengths[batch], params.rows) : params.rows;
    const int64_t columns = params.y_lengths ? std::min(params.y_lengths[batch], params.columns) : params.columns;
    VqFaults faults;
    if (count > 0 && columns > 0) {
      const Status status = vq_encode(vq_params(params, batch, count, columns, &faults), parallel, scratch);
      if (!status.ok()) return status;
    }
    const int64_t far = faults.overflow_row.load();
    if (far != VqFaults::kNone) {
      note(&params.faults->score_row, batch * params.rows + far);
      return {};
    }
    spread(params.indices + batch * params.rows * params.k, params.rows, params.k, columns > 0 ? count : 0,
           std::min(params.k, columns));
  }
  PairwiseDistancesParams distances;
  static_cast<PairwiseParams&>(distances) = params;
  distances.k = params.k;
  distances.indices = params.indices;
  distances.out = params.scores;
  return pairwise_distances_at(distances, parallel);
}

}  // namespace

int64_t pairwise_topk_scratch(const PairwiseTopkParams& params, int64_t threads) {
  const PairwiseKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return 0;
  if (searched_by_vq(params))
    return vq_encode_scratch(vq_params(params, 0, params.rows, params.columns, nullptr), threads);
  return Cut(params, *kernels, threads).bytes(params, threads);
}

Status pairwise_topk(const PairwiseTopkParams& params, const Parallel& parallel, void* scratch) {
  const PairwiseKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const Parallel pool = limited(parallel, work_of(params), kSerialWork);
  check_rows(params, params.x, params.rows, params.x_lengths, pool, &params.faults->x_row);
  // Where rows are few, reading y costs more than all that is computed. Its NaNs and infinities show in the scores.
  const bool late = params.rows > 0 && params.rows <= kFewRows && !params.x_lengths && !searched_by_vq(params);
  const auto check_y = [&] {
    check_rows(params, params.y, params.columns, params.y_lengths, pool, &params.faults->y_row);
    return params.faults->y_row == PairwiseFaults::kNone;
  };
  if (params.faults->x_row != PairwiseFaults::kNone || !(late || check_y())) return {};
  if (searched_by_vq(params)) return nearest(params, parallel, scratch);
  std::atomic<bool> seen{false};
  std::atomic<bool>* const suspicious = late ? &seen : nullptr;
  const Cut cut(params, *kernels, pool.threads);
  char* const memory = static_cast<char*>(scratch);
  char* const listed = memory + pool.threads * cut.thread_bytes;
  for_each_item(pool, params.batch * cut.items * cut.parts, [&](int64_t slot, int64_t item) {
    const int64_t block = item / cut.parts, batch = block / cut.items;
    const Range rows = part(block % cut.items, cut.rows, params.rows);
    char* const own = memory + slot * cut.thread_bytes;
    if (cut.parts > 1) {
      const Range columns = part(item % cut.parts, cut.part_columns, params.columns);
      return scan(params, *kernels, batch, rows, columns, own, cut.lists(listed, item, params.k), suspicious);
    }
    int64_t* const held = reinterpret_cast<int64_t*>(own + cut.thread_bytes) - kTopkRows;
    scan(params, *kernels, batch, rows, {0, params.columns}, own, result_lists(params, batch, rows.begin, held),
         suspicious);
    finish(params, batch, rows, held);
  });
  for_each_item(pool, cut.parts > 1 ? params.batch * cut.items : 0, [&](int64_t, int64_t block) {
    const int64_t batch = block / cut.items;
    const Range rows = part(block % cut.items, cut.rows, params.rows);
    int64_t held[kTopkRows] = {};
    const Lists to = result_lists(params, batch, rows.begin, held);
    for (int64_t i = 0; i < cut.parts; ++i) {
      const Lists from = cut.lists(listed, block * cut.parts + i, params.k);
      if (params.dtype == DType::kFloat64) {
        join<double>(from, rows.count(), params.k, to);
      } else {
        join<float>(from, rows.count(), params.k, to);
      }
    }
    finish(params, batch, rows, held);
  });
  if (seen) check_y();
  return {};
}

Status pairwise_distances_at(const PairwiseDistancesParams& params, const Parallel& parallel) {
  const PairwiseKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t size = element_size(params.dtype), items = parts(params.rows, 64);
  const Parallel pool = limited(parallel, size_product({params.batch, params.rows, params.k, params.dim}), kSerialWork);
  for_each_item(pool, params.batch * items, [&](int64_t, int64_t item) {
    const int64_t batch = item / items;
    const Range rows = part(item % items, 64, params.rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const char* const x =
          static_cast<const char*>(params.x.data) + (batch * params.x.batch_stride + row * params.x.row_stride) * size;
      for (int64_t i = 0; i < params.k; ++i) {
        const int64_t at = (batch * params.rows + row) * params.k + i, index = params.indices[at];
        if (index < 0) {
          set_number(params.out, params.dtype, at, HUGE_VAL);
          continue;
        }
        const char* const y = static_cast<const char*>(params.y.data) +
                              (batch * params.y.batch_stride + index * params.y.row_stride) * size;
        kernels->distance(x, y, params.dim, static_cast<char*>(params.out) + at * size);
      }
    }
  });
  return {};
}

Status hamming_topk(const HammingTopkParams& params, const Parallel& parallel) {
  const auto run = for_isa(params.isa, scalar::pairwise_float, avx2::pairwise_float, avx512::pairwise_float).hamming;
  const int64_t items = parts(params.rows, 8);
  const int64_t work = size_product({params.batch, params.rows, params.columns, std::max<int64_t>(params.bytes, 1)});
  for_each_item(limited(parallel, work, kSerialWork), params.batch * items,
                [&](int64_t, int64_t item) { run(params, item / items, part(item % items, 8, params.rows)); });
  return {};
}

}  // namespace pycore
