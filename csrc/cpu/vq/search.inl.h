// SPDX-License-Identifier: Apache-2.0
// A tile of rows through all stages: what they are widened to, the lists of their best codes, the beam. Every
// instruction set includes this, after its own distance() and unless it prunes nothing before its own prune.inl.h.

PYCORE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYCORE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// out[i] = element (offset + i) of data, in float32.
inline void widen(DType dtype, const void* data, int64_t offset, int64_t count, float* out) {
  switch (dtype) {
    case DType::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(from[i]);
      return;
    }
    case DType::kFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_float16(from[i]);
      return;
    }
    default: {
      const float* from = static_cast<const float*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = from[i];
    }
  }
}

// By integers, so that no compiler reasons about NaN.
inline bool all_finite(const float* x, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (bits_of_float(x[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  return bad == 0;
}

// The sum of squares in float64, where the squares are exact: sixteen lanes as in pycore/vq/vq.h.
inline double sum_of_squares(const float* x, int64_t count) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  }
  for (; i < count; ++i) lanes[i % 16] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// out = x over its length; zeros stay. x may be out.
inline void unit(const float* x, int64_t count, float* out) {
  const double squares = sum_of_squares(x, count);
  const double scale = squares > 0 ? 1.0 / __builtin_sqrt(squares) : 0.0;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) * scale);
}

// A code as distances are taken to it.
inline void load_code(const VqEncodeParams& params, const VqBook& stage, int64_t code, float* out) {
  widen(params.book_dtype, stage.given, code * stage.given_stride, params.dim, out);
  if (params.cosine) unit(out, params.dim, out);
}

// Whether the caller's code is finite; notes it if it is not.
inline bool check_code(const VqEncodeParams& params, int64_t book, const VqBook& stage, int64_t code) {
  bool finite = true;
  for (int64_t i = 0; i < params.dim && finite; ++i) {
    float element;
    widen(params.book_dtype, stage.given, code * stage.given_stride + i, 1, &element);
    finite = all_finite(&element, 1);
  }
  if (!finite) {
    VqFaults::note(&params.faults->not_finite_code, (book * params.stages + stage.stage) * params.most_codes + code);
  }
  return finite;
}

// Keeps the `keep` best of what it is given: by distance, equal ones by index. Without company a NaN is kept, so that
// every entry is an index that was given.
PYCORE_INLINE void insert(VqCandidate* best, int64_t* count, int64_t keep, float distance, int64_t index) {
  int64_t at = *count;
  if (at == keep) {
    const VqCandidate& last = best[keep - 1];
    if (!(distance < last.distance || (distance == last.distance && index < last.index))) return;
    --at;
  } else {
    ++*count;
  }
  for (; at > 0; --at) {
    const VqCandidate& before = best[at - 1];
    if (!(distance < before.distance || (distance == before.distance && index < before.index))) break;
    best[at] = before;
  }
  best[at] = {distance, index};
}

// What a thread works on.
struct VqTile {
  VqTile(const VqEncodeParams& params, const VqPlan& plan, char* scratch)
      : residual(reinterpret_cast<float*>(scratch + plan.residual)),
        other(residual + plan.tile_lines * params.dim),
        query(reinterpret_cast<float*>(scratch + plan.query)),
        shifted(reinterpret_cast<float*>(scratch + plan.shifted)),
        maxima(reinterpret_cast<float*>(scratch + plan.maxima)),
        squares(reinterpret_cast<double*>(scratch + plan.squares)),
        best(reinterpret_cast<VqCandidate*>(scratch + plan.best)),
        counts(reinterpret_cast<int64_t*>(scratch + plan.counts)),
        tops(reinterpret_cast<float*>(scratch + plan.tops)),
        history(reinterpret_cast<VqStep*>(scratch + plan.history)) {}
  float *residual, *other, *query, *shifted, *maxima;
  double* squares;
  VqCandidate* best;
  int64_t* counts;
  float* tops;
  VqStep* history;
};

// The distances of one line to codes [begin, end).
inline void search_directly(const VqEncodeParams& params, int64_t book, const VqBook& stage, const float* query,
                            Range codes, int64_t beam, VqCandidate* best, int64_t* count, int64_t keep) {
  const int64_t first = beam * stage.codes;
  for (int64_t code = codes.begin; code < codes.end; ++code) {
    const float r = distance(query, stage.rows + code * stage.row_stride, params.dim);
    if (!(r <= __FLT_MAX__)) check_code(params, book, stage, code);
    insert(best, count, keep, r, first + code);
  }
}

#ifdef PYCORE_VQ_PRUNES
void search_pruned(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook& stage,
                   const float* query, int64_t rows, int64_t beams, int64_t keep, const VqTile& tile);
#endif

// best[row][0 .. keep - 1] of every row, over all its beams: query [rows][beams][dim].
inline void search(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook& stage,
                   const float* query, int64_t rows, int64_t beams, int64_t keep, const VqTile& tile) {
  for (int64_t row = 0; row < rows; ++row) tile.counts[row] = 0;
#ifdef PYCORE_VQ_PRUNES
  if (plan.prune && !__atomic_load_n(&stage.large, __ATOMIC_RELAXED)) {
    return search_pruned(params, plan, book, stage, query, rows, beams, keep, tile);
  }
#endif
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t beam = 0; beam < beams; ++beam) {
      search_directly(params, book, stage, query + (row * beams + beam) * params.dim, {0, stage.codes}, beam,
                      tile.best + row * plan.keep, tile.counts + row, keep);
    }
  }
}

// to = from less the code, as the caller gave it.
inline void subtract_code(const VqEncodeParams& params, const VqBook& stage, int64_t code, const float* from,
                          float* to) {
  if (params.book_dtype == DType::kFloat32) {
    const float* c = static_cast<const float*>(stage.given) + code * stage.given_stride;
    for (int64_t i = 0; i < params.dim; ++i) to[i] = from[i] - c[i];
    return;
  }
  constexpr int64_t kPiece = 64;
  float c[kPiece];
  for (int64_t i = 0; i < params.dim; i += kPiece) {
    const int64_t count = smaller(kPiece, params.dim - i);
    widen(params.book_dtype, stage.given, code * stage.given_stride + i, count, c);
    for (int64_t j = 0; j < count; ++j) to[i + j] = from[i + j] - c[j];
  }
}

void encode_rows(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook* const* stages,
                 Range range, char* scratch) {
  VqTile tile(params, plan, scratch);
  const int64_t rows = range.count(), dim = params.dim, kept = plan.keep;
  const auto load = [&](int64_t row, float* out) {
    widen(params.x_dtype, params.x.data, params.x.offset(range.begin + row) + book * params.x_book_stride, dim, out);
    if (all_finite(out, dim)) return;
    VqFaults::note(&params.faults->not_finite_row, (range.begin + row) * params.books + book);
    for (int64_t i = 0; i < dim; ++i) out[i] = 0.0f;
  };
  for (int64_t row = 0; row < rows; ++row) load(row, tile.residual + row * dim);

  int64_t beams = 1;
  for (int64_t q = 0; q < params.stages; ++q) {
    const VqBook& stage = *stages[q];
    const bool masked = q < params.masks, last = q + 1 == params.stages;
    const float* query = tile.residual;
    if (masked) {
      const float* mask = params.channel_masks + q * dim;
      for (int64_t row = 0; row < rows; ++row) {
        float* line = tile.query + row * dim;
        load(row, line);
        for (int64_t i = 0; i < dim; ++i) line[i] *= mask[i];
      }
      query = tile.query;
    }
    if (params.cosine) {
      for (int64_t line = 0; line < rows * beams; ++line) unit(query + line * dim, dim, tile.query + line * dim);
      query = tile.query;
    }
    const int64_t wanted = params.stages == 1 ? params.topk : masked || last ? 1 : params.beam_size;
    const int64_t keep = smaller(wanted, beams * stage.codes);
    search(params, plan, book, stage, query, rows, beams, keep, tile);
    for (int64_t row = 0; row < rows; ++row) {
      if (!(tile.best[row * kept + keep - 1].distance <= __FLT_MAX__)) {
        VqFaults::note(&params.faults->overflow_row, (range.begin + row) * params.books + book);
      }
    }
    if (params.stages == 1) {
      for (int64_t row = 0; row < rows; ++row) {
        int64_t* codes = params.codes + ((range.begin + row) * params.books + book) * params.topk;
        for (int64_t j = 0; j < keep; ++j) codes[j] = tile.best[row * kept + j].index;
      }
      return;
    }
    float* const next = beams == 1 && keep == 1 ? tile.residual : tile.other;
    VqStep* steps = tile.history + q * plan.tile_rows * kept;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < keep; ++j) {
        const int64_t index = tile.best[row * kept + j].index, parent = index / stage.codes;
        const int64_t code = index - parent * stage.codes;
        steps[row * kept + j] = {static_cast<int32_t>(parent), code};
        if (last) continue;
        subtract_code(params, stage, code, tile.residual + (row * beams + parent) * dim, next + (row * keep + j) * dim);
      }
    }
    if (next != tile.residual) {
      tile.other = tile.residual;
      tile.residual = next;
    }
    beams = keep;
  }
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* codes = params.codes + ((range.begin + row) * params.books + book) * params.stages;
    int64_t beam = 0;
    for (int64_t q = params.stages - 1; q >= 0; --q) {
      const VqStep& step = tile.history[(q * plan.tile_rows + row) * kept + beam];
      codes[q] = step.code;
      beam = step.parent;
    }
  }
}
