// SPDX-License-Identifier: Apache-2.0
// A stream that is written or read a few symbols at a time, for pybind11's classes: the same bytes as the batched
// kernels'. Unlike a kernel it owns its memory. A call that throws leaves the state as it was.
#pragma once

#include <pycore/arithmetic_coding/crc_run.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic_coding_args.h"

namespace pycore {

// Adds bytes to a CRC-32C a bit at a time.
struct AddBytes {
  uint32_t operator()(uint32_t crc, const uint8_t* data, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; ++i) crc = crc32c_add(crc, data[i]);
    return crc;
  }
};

// One row of cumulative frequencies [symbols + 1], int32 or uint16, any stride.
struct RowOfCdf {
  const TensorView& view;
  int64_t offset;  // of its first entry, in elements
  int64_t symbols;

  RowOfCdf(const TensorView& cdf, int64_t row)
      : view(cdf),
        offset(cdf.dims == 2 && cdf.shape[0] > 1 ? row * cdf.strides[0] : 0),
        symbols(cdf.shape[cdf.dims - 1] - 1) {}

  uint32_t operator[](int64_t i) const {
    const int64_t at = offset + i * view.strides[view.dims - 1];
    if (view.dtype == DType::kInt32) return static_cast<uint32_t>(view.as<int32_t>()[at]);
    return i == symbols ? view.as<uint16_t>()[at] + 65536u : view.as<uint16_t>()[at];
  }

  // Its precision, once it is known to be a cumulative distribution. (Another thread may write to it afterwards: shares
  // are checked by themselves too.)
  int checked(const char* op, int64_t row) const {
    const uint32_t total = (*this)[symbols];
    bool good = (*this)[0] == 0 && total >= 2 && total <= 1u << kMaxPrecision && (total & (total - 1)) == 0;
    for (int64_t i = 0; good && i < symbols; ++i) good = (*this)[i] <= (*this)[i + 1];
    check_value(good, op, "cdf[", row,
                "] is no cumulative distribution: it must rise from 0 to a power of two up to 2^", kMaxPrecision);
    return __builtin_ctz(total);
  }

  uint64_t fingerprint() const {
    uint64_t hash = kFingerprintStart;
    for (int64_t i = 0; i <= symbols; ++i) hash = fingerprint_add(hash, (*this)[i]);
    return hash;
  }
};

// cdf [V + 1], or a row for each of `count` symbols. Gives the number of rows.
inline int64_t check_stream_cdf(const char* op, const TensorView& cdf, std::optional<int64_t> count) {
  check_on_cpu(op, "cdf", cdf);
  check_value(cdf.dtype == DType::kInt32 || cdf.dtype == DType::kUInt16, op, "cdf has dtype ", dtype_name(cdf.dtype),
              " and must have int32 or uint16");
  check_value((cdf.dims == 1 || cdf.dims == 2) && cdf.shape[cdf.dims - 1] >= 2, op, "cdf has shape ", shape_text(cdf),
              " and must be [symbols + 1] or [length, symbols + 1]");
  const int64_t rows = cdf.dims == 2 ? cdf.shape[0] : 1;
  check_value(!count || rows == 1 || rows == *count, op, "cdf has ", rows, " rows and must have 1 or ",
              count.value_or(1), ", one for each symbol");
  return rows;
}

inline int64_t integer_at(const TensorView& view, int64_t i) {
  switch (view.dtype) {
    case DType::kInt8: return view.as<int8_t>()[i];
    case DType::kInt16: return view.as<int16_t>()[i];
    case DType::kInt32: return view.as<int32_t>()[i];
    case DType::kUInt8: return view.as<uint8_t>()[i];
    case DType::kUInt16: return view.as<uint16_t>()[i];
    case DType::kUInt32: return view.as<uint32_t>()[i];
    default: return view.as<int64_t>()[i];
  }
}

inline void check_share(const char* op, bool good) {
  check_value(good, op, "cdf has changed while it was read, and no other thread must write to it then");
}

class StreamEncoder {
 public:
  static constexpr const char* kOp = "ArithmeticEncoder";

  explicit StreamEncoder(std::optional<int64_t> model_id) {
    check_value(model_id.value_or(0) >= 0, kOp, "model_id is ", model_id.value_or(0), " and must be 0 to 2^63 - 1");
    frame_.has_id = model_id.has_value();
    frame_.model = model_id ? static_cast<uint64_t>(*model_id) : kFingerprintStart;
    bytes_.resize(kFrameBytes);
  }

  void encode(const std::vector<int64_t>& symbols, const TensorView& cdf) {
    check_value(!finished_, kOp, "encode() after finish(): a stream is finished once");
    const int64_t rows = check_stream_cdf(kOp, cdf, static_cast<int64_t>(symbols.size()));
    struct Step {
      uint32_t begin, width;
      int precision;
    };
    std::vector<Step> steps;
    steps.reserve(symbols.size());
    int precision = 0;
    for (size_t i = 0; i < symbols.size(); ++i) {
      const RowOfCdf row(cdf, static_cast<int64_t>(i));
      if (i == 0 || rows > 1) precision = row.checked(kOp, static_cast<int64_t>(i));
      check_index(symbols[i] >= 0 && symbols[i] < row.symbols, kOp, "symbols[", i, "] is ", symbols[i],
                  " and must be 0 to ", row.symbols - 1);
      const uint32_t begin = row[symbols[i]], end = row[symbols[i] + 1], width = end - begin;
      check_share(kOp, begin <= end && end <= 1u << precision);
      check_value(width > 0, kOp, "symbols[", i, "] is ", symbols[i],
                  ", which cdf gives no share and so cannot be coded");
      steps.push_back({begin, width, precision});
    }
    if (steps.empty()) return;
    // Nothing below runs out of memory half way; and growing by what one call needs would copy the stream at each.
    const size_t needed = bytes_.size() + 4 * steps.size();
    if (needed > bytes_.capacity()) bytes_.reserve(std::max(needed, 2 * bytes_.capacity()));
    if (frame_.count == 0 && !frame_.has_id) frame_.model = RowOfCdf(cdf, 0).fingerprint();
    for (size_t i = 0; i < steps.size(); ++i) {
      if (range_encode(&coder_, steps[i].begin, steps[i].width, steps[i].precision)) carry();
      while (range_needs_word(coder_.range)) put_word(range_take_word(&coder_));
      uint8_t symbol[4];
      put_bytes(symbol, static_cast<uint64_t>(symbols[i]), 4);
      crc_ = AddBytes()(crc_, symbol, 4);
    }
    frame_.count += static_cast<int64_t>(steps.size());
  }

  std::string finish() {
    check_value(!finished_, kOp, "finish() was called before: a stream is finished once");
    position_ = position();
    finished_ = true;
    uint16_t word;
    if (range_finish(&coder_, &word)) carry();
    put_word(word);
    while (bytes_.size() > static_cast<size_t>(kFrameBytes) && bytes_.back() == 0) bytes_.pop_back();
    frame_.payload = static_cast<int64_t>(bytes_.size()) - kFrameBytes;
    frame_.symbols_crc = ~crc_;
    write_frame(bytes_.data(), frame_);
    put_bytes(bytes_.data() + kCrcOffset, frame_crc(bytes_.data(), static_cast<int64_t>(bytes_.size()), AddBytes()), 4);
    return std::string(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
  }

  int64_t count() const { return frame_.count; }
  // Bits of the payload that the symbols so far have settled; what a decoder says after as many.
  int64_t position() const {
    return finished_ ? position_
                     : range_position((static_cast<int64_t>(bytes_.size()) - kFrameBytes) / 2, coder_.range);
  }

 private:
  void put_word(uint16_t word) {
    bytes_.push_back(static_cast<uint8_t>(word >> 8));
    bytes_.push_back(static_cast<uint8_t>(word));
  }
  void carry() {
    size_t i = bytes_.size();
    do {
      --i;
    } while (++bytes_[i] == 0);
  }

  Frame frame_;
  RangeEncoder coder_;
  std::vector<uint8_t> bytes_;
  uint32_t crc_ = ~0u;
  bool finished_ = false;
  int64_t position_ = 0;  // once it is finished
};

class StreamDecoder {
 public:
  static constexpr const char* kOp = "ArithmeticDecoder";

  StreamDecoder(std::string data, std::optional<int64_t> model_id) : data_(std::move(data)) {
    check_value(model_id.value_or(0) >= 0, kOp, "model_id is ", model_id.value_or(0), " and must be 0 to 2^63 - 1");
    StreamResult result;
    frame_ = read_frame(bytes(), static_cast<int64_t>(data_.size()), AddBytes(), &result);
    if (result.fault == CoderFault::kNone && frame_.kind != kRowsKind) {
      result.fault = CoderFault::kKind;
      result.value = frame_.kind;
    }
    if (result.fault == CoderFault::kNone && frame_.has_id != model_id.has_value() && (frame_.has_id || model_id)) {
      result.fault = CoderFault::kModel;
    }
    if (result.fault == CoderFault::kNone && model_id && frame_.model != static_cast<uint64_t>(*model_id)) {
      result.fault = CoderFault::kModel;
    }
    check_result(kOp, "data", 0, result, "cdf", CoderModel());
    check_value(frame_.lanes == 1, kOp, "data has ", frame_.lanes, " lanes and must have 1: decode it with ac_decode");
    next_ = kFrameBytes;
    for (int i = 0; i < 4; ++i) coder_.code = coder_.code << 16 | word();
  }

  std::vector<int64_t> decode(const TensorView& cdf, std::optional<int64_t> wanted) {
    const int64_t rows = check_stream_cdf(kOp, cdf, wanted), count = wanted.value_or(rows);
    check_value(count >= 0, kOp, "count is ", count, " and must not be negative");
    if (count > frame_.count - decoded_) {
      fail("data has " + std::to_string(frame_.count) + " symbols, " + std::to_string(frame_.count - decoded_) +
           " of them left, and " + std::to_string(count) + " are asked for");
    }
    check_claim(cdf, rows, count);
    // Memory follows what has been decoded: how many there are is only what the frame claims.
    std::vector<int64_t> symbols;
    symbols.reserve(static_cast<size_t>(std::min(count, kFewSymbols)));
    const Saved before{coder_, next_, words_, spent_, crc_, decoded_};
    try {
      int precision = 0;
      for (int64_t i = 0; i < count; ++i) {
        const RowOfCdf row(cdf, i);
        if (i == 0 || rows > 1) precision = row.checked(kOp, i);
        if (decoded_ == 0 && !frame_.has_id && frame_.model != row.fingerprint()) {
          fail("data was coded with another model");
        }
        symbols.push_back(take(row, precision));
      }
    } catch (...) {
      coder_ = before.coder;
      next_ = before.next;
      words_ = before.words;
      spent_ = before.spent;
      crc_ = before.crc;
      decoded_ = before.decoded;
      throw;
    }
    return symbols;
  }

  void finish() const {
    if (decoded_ != frame_.count) {
      fail("data has " + std::to_string(frame_.count) + " symbols and " + std::to_string(decoded_) + " were decoded");
    }
    if (~crc_ != frame_.symbols_crc) {
      fail("data was coded with other distributions: the symbols' checksum does not hold");
    }
  }

  int64_t count() const { return frame_.count; }
  int64_t remaining() const { return frame_.count - decoded_; }
  // Bits of the payload that the symbols so far have settled: not those that were read ahead.
  int64_t position() const { return range_position(words_, coder_.range); }

 private:
  static constexpr int64_t kFewSymbols = 1 << 16, kBitsPastEnd = 256;

  struct Saved {
    RangeDecoder coder;
    int64_t next, words, spent;
    uint32_t crc;
    int64_t decoded;
  };

  [[noreturn]] static void fail(const std::string& sentence) {
    throw BitstreamError(std::string(kOp) + ": " + sentence);
  }
  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(data_.data()); }

  uint16_t word() {
    const int64_t size = static_cast<int64_t>(data_.size());
    const uint32_t high = next_ < size ? bytes()[next_] : 0, low = next_ + 1 < size ? bytes()[next_ + 1] : 0;
    next_ = next_ + 2 < size ? next_ + 2 : size;
    return static_cast<uint16_t>(high << 8 | low);
  }

  // A code of 0 behind the payload stands for the first symbol that has a share, however often. Where that is all that
  // is left, the checksum says at once whether it was coded, before there is memory for so many.
  void check_claim(const TensorView& cdf, int64_t rows, int64_t count) const {
    if (count <= kFewSymbols || rows > 1 || count != remaining() || !ended() || coder_.code != 0) return;
    const RowOfCdf row(cdf, 0);
    row.checked(kOp, 0);
    int64_t first = 0;
    while (first < row.symbols - 1 && row[first + 1] == 0) ++first;
    if (~crc32c_run(crc_, static_cast<uint32_t>(first), count) != frame_.symbols_crc) {
      fail("data was coded with other distributions: the symbols' checksum does not hold");
    }
  }
  bool ended() const { return next_ == static_cast<int64_t>(data_.size()); }

  int64_t take(const RowOfCdf& row, int precision) {
    if (ended()) {
      if (coder_.code != 0 && spent_ > kBitsPastEnd << kMaxPrecision) {
        fail("data is damaged: it claims " + std::to_string(frame_.count) +
             " symbols, and its payload cannot hold them");
      }
    }
    const uint64_t value = range_locate(coder_, precision);
    if (value >> precision) fail("data was coded with other distributions: no symbol has its next code");
    int64_t low = 0, high = row.symbols - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (row[middle] <= value) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const uint32_t begin = row[low], end = row[low + 1];
    check_share(kOp, begin < end && end <= 1u << precision);
    if (ended()) {  // -log2(share) >= 1 - share
      spent_ += int64_t{(1u << precision) - (end - begin)} << (kMaxPrecision - precision);
    }
    range_consume(&coder_, begin, end - begin, precision);
    while (range_needs_word(coder_.range)) {
      range_put_word(&coder_, word());
      ++words_;
    }
    uint8_t symbol[4];
    put_bytes(symbol, static_cast<uint64_t>(low), 4);
    crc_ = AddBytes()(crc_, symbol, 4);
    ++decoded_;
    return low;
  }

  std::string data_;
  Frame frame_;
  RangeDecoder coder_;
  int64_t next_ = 0, decoded_ = 0;
  int64_t words_ = 0;  // taken beyond the first four
  int64_t spent_ = 0;  // behind the payload: at least so many bits, times 2^kMaxPrecision
  uint32_t crc_ = ~0u;
};

}  // namespace pycore
