// SPDX-License-Identifier: Apache-2.0
// Loading a key tile for the vector kernels, and products restricted to kept pairs. Include after
// tile_product.inl.h, inside the same target region.

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

PYCORE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Channel counts in scratch are padded to whole vectors.
PYCORE_INLINE int64_t padded(int64_t channels) { return round_up(channels, Vec::kWidth); }

// Hands out 64-byte aligned pieces of a thread's scratch; with a null base it only adds up their sizes.
struct Scratch {
  char* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(base + used);
    used += round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
    return piece;
  }
};

PYCORE_INLINE void copy_row(const float* x, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) Vec::load(x + d).store(out + d);
  if (d < n) Vec::load_first(x + d, n - d).store_first(out + d, n - d);
}

PYCORE_INLINE void zero_rows(float* x, int64_t floats) {
  for (int64_t d = 0; d < floats; d += Vec::kWidth) Vec::zero().store(x + d);
}

// rotate_row in vectors: where the pairs lie half a rotation apart and fill whole vectors.
PYCORE_INLINE void rotate(const AttentionParams& params, const float* x, int64_t distance, float* out) {
  const int64_t half = params.rope_dim / 2;
  if (params.rope_interleaved || half % Vec::kWidth != 0) return rotate_row<float>(params, x, distance, out);
  const int64_t row = distance < 0 ? -distance : distance;
  const float* cosine = static_cast<const float*>(params.rope_cos) + row * params.rope_stride;
  const float* sine = static_cast<const float*>(params.rope_sin) + row * params.rope_stride;
  const Vec sign = Vec::broadcast(distance < 0 ? -1.0f : 1.0f);
  for (int64_t i = 0; i < half; i += Vec::kWidth) {
    const Vec a = Vec::load(x + i), b = Vec::load(x + half + i);
    const Vec c = Vec::load(cosine + i), s = Vec::load(sine + i) * sign;
    Vec::fnma(b, s, a * c).store(out + i);
    Vec::fma(a, s, b * c).store(out + half + i);
  }
  if (out != x) copy_row(x + params.rope_dim, params.head_dim - params.rope_dim, out + params.rope_dim);
}

// A row in float32, into `out`. bfloat16 and float16 are exact in float32.
PYCORE_INLINE void load_row(DType dtype, const char* row, int64_t n, float* out) {
  if (dtype == DType::kFloat32) return copy_row(reinterpret_cast<const float*>(row), n, out);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  const bool brain = dtype == DType::kBFloat16;
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) {
    (brain ? Vec::load_bfloat16(halves + d) : Vec::load_float16(halves + d)).store(out + d);
  }
  if (d == n) return;
  uint16_t tail[Vec::kWidth] = {};
  __builtin_memcpy(tail, halves + d, static_cast<size_t>(n - d) * sizeof(uint16_t));
  (brain ? Vec::load_bfloat16(tail) : Vec::load_float16(tail)).store_first(out + d, n - d);
}

PYCORE_INLINE void store_row(DType dtype, const float* x, int64_t n, char* row) {
  if (dtype == DType::kFloat32) return copy_row(x, n, reinterpret_cast<float*>(row));
  uint16_t* halves = reinterpret_cast<uint16_t*>(row);
  if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < n; ++d) halves[d] = bfloat16_from_float(x[d]);
    return;
  }
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) Vec::load(x + d).store_float16(halves + d);
  for (; d < n; ++d) halves[d] = float16_from_float(x[d]);
}

// The rows of one key tile in float32, by position; absent positions have no row.
struct TileRows {
  const float* rows[kKeyTile];  // null where absent
};

// float32 rows stay where they are; others are converted into `copy`, padded(n) apart.
PYCORE_INLINE void tile_rows(const AttentionParams& params, const void* data, const AttentionStrides& strides,
                             const RowMap& map, int64_t b, int64_t kv_head, int64_t tile, uint64_t present, int64_t n,
                             float* copy, TileRows* out) {
  for (int64_t c = 0; c < kKeyTile; ++c) {
    out->rows[c] = nullptr;
    if (!(present >> c & 1)) continue;
    const char* row = row_of(params, data, strides, b, kv_head, map.key_row(tile * kKeyTile + c));
    if (params.dtype == DType::kFloat32) {
      out->rows[c] = reinterpret_cast<const float*>(row);
    } else {
      load_row(params.dtype, row, n, copy + c * padded(n));
      out->rows[c] = copy + c * padded(n);
    }
  }
}

// out[d][c] = rows[c][d] for d < n, zero in absent columns. `out` has kKeyTile columns and padded(n) rows.
__attribute__((noinline)) void transpose_rows(const TileRows& tile, int64_t n, float* out) {
  for (int64_t c = 0; c < kKeyTile; c += Vec::kWidth) {
    for (int64_t d = 0; d < n; d += Vec::kWidth) {
      Vec block[Vec::kWidth];
      if (d + Vec::kWidth <= n) {
        for (int i = 0; i < Vec::kWidth; ++i) {
          block[i] = tile.rows[c + i] ? Vec::load(tile.rows[c + i] + d) : Vec::zero();
        }
      } else {
        for (int i = 0; i < Vec::kWidth; ++i) {
          block[i] = tile.rows[c + i] ? Vec::load_first(tile.rows[c + i] + d, n - d) : Vec::zero();
        }
      }
      transpose(block);
      for (int i = 0; i < Vec::kWidth; ++i) block[i].store(out + (d + i) * kKeyTile + c);
    }
  }
}

// Rotates every present row of tile `tile` by its place in it into `out`, whose rows are `stride` apart.
PYCORE_INLINE void rotate_rows(const AttentionParams& params, const TileSchedule& schedule, int64_t tile,
                               const TileRows& keys, int64_t stride, float* out, TileRows* rotated) {
  for (int64_t c = 0; c < kKeyTile; ++c) {
    rotated->rows[c] = keys.rows[c] ? out + c * stride : nullptr;
    if (keys.rows[c]) rotate(params, keys.rows[c], key_turn(schedule, tile, c), out + c * stride);
  }
}

// The tile as a matrix with one row stride: the rows themselves if they are contiguous, else a copy (rows far apart
// would fight for the same cache sets). `copy` is what tile_rows converted into. Absent rows stay unset: nothing reads
// them.
PYCORE_INLINE const float* matrix_rows(const AttentionParams& params, const TileRows& tile, uint64_t present,
                                       bool contiguous, int64_t row_stride, int64_t n, float* copy, int64_t* stride) {
  if (params.dtype == DType::kFloat32 && contiguous && row_stride <= n + Vec::kWidth && present) {
    const int64_t first = __builtin_ctzll(present);
    *stride = row_stride;
    return tile.rows[first] - first * row_stride;
  }
  *stride = padded(n);
  for (int64_t c = 0; c < kKeyTile && params.dtype == DType::kFloat32; ++c) {
    if (tile.rows[c]) copy_row(tile.rows[c], n, copy + c * *stride);
  }
  return copy;
}

// Which keys a block of rows keeps of a tile.
struct BlockKeeps {
  uint64_t bits[kProductRows];  // by row
  uint64_t any = 0, all = ~uint64_t{0};

  PYCORE_INLINE void set(int m, uint64_t row_bits) {
    bits[m] = row_bits;
    any |= row_bits;
    all &= row_bits;
  }
  PYCORE_INLINE int64_t first() const { return __builtin_ctzll(any); }
  PYCORE_INLINE int64_t end() const { return 64 - __builtin_clzll(any); }
};

// c[m] += sum over the set bits k of bits[m], ascending, of A[m][k] B[k]. A[m][k] is a[m * a_row + k] or, transposed,
// a[k * a_row + m]. Pairs that are not kept are not touched, so what they hold (NaN too) does not matter. The run of
// k that every row keeps goes through the block product; the ragged ends go row by row, in the same order. Where all
// rows keep the same, every run does.
template <bool kTransposed>
__attribute__((noinline)) void accumulate_kept(int64_t rows, const BlockKeeps& keeps, const float* a, int64_t a_row,
                                               const float* b, int64_t b_row, int64_t n, float* c, int64_t c_row) {
  if (keeps.any == 0) return;
  const auto a_at = [&](int64_t m, int64_t k) { return kTransposed ? a + k * a_row + m : a + m * a_row + k; };
  // Rows m .. m + count - 1, all of which keep `bits`.
  const auto product = [&](int64_t m, int64_t count, uint64_t bits) {
    while (bits) {
      const int64_t k = __builtin_ctzll(bits);
      const uint64_t rest = ~(bits >> k);
      const int64_t run = rest ? __builtin_ctzll(rest) : 64;
      tile_product<kTransposed>(count, run, a_at(m, k), a_row, b + k * b_row, b_row, 0, n,
                                AccumulateBlock{c + m * c_row, c_row});
      bits &= ~bit_range(k, k + run);
    }
  };
  if (keeps.any == keeps.all) return product(0, rows, keeps.any);
  int64_t begin = 64, end = 64;
  if (keeps.all) {
    begin = __builtin_ctzll(keeps.all);
    const uint64_t rest = ~(keeps.all >> begin);
    end = begin + (rest ? __builtin_ctzll(rest) : 64);
    if (end > 64) end = 64;
  }
  const uint64_t before = bit_range(0, begin), after = bit_range(end, 64);
  if (keeps.any & before) {
    for (int64_t m = 0; m < rows; ++m) product(m, 1, keeps.bits[m] & before);
  }
  if (end > begin) {
    tile_product<kTransposed>(rows, end - begin, a_at(0, begin), a_row, b + begin * b_row, b_row, 0, n,
                              AccumulateBlock{c, c_row});
  }
  if (keeps.any & after) {
    for (int64_t m = 0; m < rows; ++m) product(m, 1, keeps.bits[m] & after);
  }
}
