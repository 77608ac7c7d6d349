// SPDX-License-Identifier: Apache-2.0
// From scores to logits where more than a scale stands between them: softcap, distance bias, ALiBi; and dropout.
// Logits are in base 2. Include after attention_tiles.inl.h.

constexpr float kTanh[] = {-3.333333323e-1f, 1.333331329e-1f,  -5.396164700e-2f,
                           2.178906705e-2f,  -8.412441214e-3f, 2.373401437e-3f};

// tanh within a few units in the last place: an odd polynomial near zero, 1 - 2 / (e^2x + 1) elsewhere.
PYCORE_INLINE Vec tanh_of(Vec x) {
  const Vec z = x * x;
  Vec y = Vec::broadcast(kTanh[5]);
  for (int i = 4; i >= 0; --i) y = Vec::fma(y, z, Vec::broadcast(kTanh[i]));
  const Vec near_zero = Vec::fma(x * z, y, x);
  const Vec one = Vec::broadcast(1.0f), top = Vec::broadcast(20.0f);  // tanh(20) is 1
  const Vec clamped = Vec::zero() - Vec::max(Vec::zero() - x, Vec::zero() - top);
  const Vec power = (clamped * Vec::broadcast(2 * kLog2E)).exp2();
  const Vec far = Vec::fnma(Vec::broadcast(2.0f), one / (power + one), one);
  const Vec magnitude = Vec::max(x, Vec::zero() - x);
  return near_zero.select(magnitude.below(Vec::broadcast(0.6f)), far);
}

// Whether a logit is its score times a positive factor, the common case.
PYCORE_INLINE bool plain_logits(const AttentionParams& params) {
  return params.softcap == 0 && !has_bias(params) && params.block_bias == nullptr;
}

// Consecutive queries against one tile see count + 63 distances, so a head's biases are one strip: the query at
// position p reads strip[p_hi - p + c] for key c of the tile.
PYCORE_INLINE int64_t strip_length(int64_t count) { return count + kKeyTile - 1; }

PYCORE_INLINE void fill_strip(const AttentionParams& params, int64_t h, int64_t p_hi, int64_t tile, int64_t count,
                              float* strip) {
  const int64_t distance = p_hi - tile * kKeyTile;
  for (int64_t t = 0; t < strip_length(count); ++t) strip[t] = bias_of<float>(params, h, distance - t) * kLog2E;
}

// One row's scores in place -> logits, columns begin..end-1 (whole vectors). `strip` is this row's, or null; `slopes`,
// if not null, gets the derivative of softcap.
PYCORE_INLINE void logits_of(const AttentionParams& params, float* scores, int64_t begin, int64_t end,
                             const float* strip, float* slopes) {
  const float cap = static_cast<float>(params.softcap);
  const Vec scale = Vec::broadcast(static_cast<float>(params.scale) * (cap > 0 ? 1 / cap : kLog2E));
  const Vec one = Vec::broadcast(1.0f), height = Vec::broadcast(cap * kLog2E);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    Vec x = Vec::load(scores + c) * scale;
    if (cap > 0) {
      const Vec bent = tanh_of(x);
      if (slopes) Vec::fnma(bent, bent, one).store(slopes + c);
      x = bent * height;
    }
    if (strip) x = x + Vec::load(strip + c);
    x.store(scores + c);
  }
}

// block_bias joins the logits of the row at position p. A vector of keys lies in one block.
PYCORE_INLINE void add_block_bias(const AttentionParams& params, int64_t h, int64_t p, int64_t tile, float* logits,
                                  int64_t begin, int64_t end) {
  const int64_t base = tile * kKeyTile;
  const uint64_t sinks = tile_bits(base, 0, params.schedule.sink_size);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    // The last key of the vector: where some are sinks, they are the first.
    const float bias = block_bias_of<float>(params, h, p, base + c + Vec::kWidth - 1) * kLog2E;
    const Vec x = Vec::load(logits + c);
    x.select(sinks >> c, x + Vec::broadcast(bias)).store(logits + c);
  }
}

// One row times what dropout makes of its weights, columns begin..end-1.
PYCORE_INLINE void drop_out(const AttentionParams& params, float* row, int64_t begin, int64_t end, uint64_t dropped) {
  const Vec factor = Vec::broadcast(static_cast<float>(1 / (1 - params.dropout_p)));
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    Vec::zero().select(dropped >> c, Vec::load(row + c) * factor).store(row + c);
  }
}
