// SPDX-License-Identifier: Apache-2.0
// The coder on damaged, forged and random streams, under the sanitizers: every stream lies in a buffer of exactly its
// size, so that a read past it is seen. Most cases are tiny, because a case is worth its number. Whatever is no stream
// of these symbols must be refused, or decode to the symbols that were coded; rows that are no distributions must do no
// harm.
#include <pycore/arithmetic_coding/frame.h>
#include <pycore/cpu_isa.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using pycore::CoderFault;
using pycore::DType;

constexpr int64_t kCases = 4'000'000;  // on each instruction set
int64_t cases = 0, decoded = 0, failures = 0;
uint64_t state = 88172645463325252u;

uint64_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state >> 11;
}
int64_t draw(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % (high - low + 1)); }

void expect(bool good, const char* what) {
  if (!good && ++failures < 20) std::fprintf(stderr, "case %ld: %s\n", long(cases), what);
}

uint32_t add(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) crc = pycore::crc32c_add(crc, data[i]);
  return crc;
}

// Exactly `bytes`, so that the sanitizer sees what lies behind them.
struct Exact {
  explicit Exact(const std::vector<uint8_t>& from)
      : size(static_cast<int64_t>(from.size())), data(new uint8_t[from.size()]) {
    if (size) std::memcpy(data.get(), from.data(), from.size());
  }
  int64_t size;
  std::unique_ptr<uint8_t[]> data;
};

struct Problem {
  int64_t symbols, length, lanes;
  int precision;
  bool fixed, narrow, logits, id;
  std::vector<int32_t> cdf;
  std::vector<uint16_t> cdf16;
  std::vector<float> values;
  std::vector<int32_t> drawn;

  int64_t width() const { return symbols + (logits ? 0 : 1); }
  int64_t rows() const { return fixed ? 1 : length; }
  pycore::CoderModel model() const {
    pycore::CoderModel out;
    out.dtype = logits ? DType::kFloat32 : narrow ? DType::kUInt16 : DType::kInt32;
    out.data = logits   ? static_cast<const void*>(values.data())
               : narrow ? static_cast<const void*>(cdf16.data())
                        : static_cast<const void*>(cdf.data());
    out.position_stride = fixed ? 0 : width();
    out.symbols = symbols;
    out.precision = precision;
    out.has_id = id;
    out.id = 77;
    return out;
  }
};

char* scratch_of(int64_t bytes) {
  static std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(static_cast<size_t>(bytes + 64));
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

Problem draw_problem() {
  Problem p;
  const bool large = draw(0, 63) == 0;  // precisions and alphabets of real use, now and then
  p.narrow = large ? draw(0, 1) : false;
  p.precision = static_cast<int>(p.narrow ? 16 : large ? draw(12, 24) : draw(3, 7));
  p.symbols = large ? draw(1, 300) : draw(1, 8);
  p.length = large ? draw(0, 60) : draw(0, 12);
  p.lanes = draw(0, 3) ? 1 : draw(2, 5);
  p.fixed = draw(0, 1);
  p.logits = draw(0, 3) == 0;
  if (p.logits) p.narrow = false;
  p.id = draw(0, 2) == 0;
  for (int64_t row = 0; row < std::max<int64_t>(p.rows(), 1); ++row) {
    for (int64_t i = 0; i < p.symbols; ++i) p.values.push_back(static_cast<float>(draw(-80, 80)) / 16);
  }
  p.cdf.resize(std::max<int64_t>(p.rows(), 1) * (p.symbols + 1));
  int64_t fault = pycore::kNoFault;
  pycore::QuantizeParams quantize;
  quantize.logits = true;
  quantize.precision = p.precision;
  quantize.symbols = p.symbols;
  quantize.values.data = p.values.data();
  quantize.values.rows = static_cast<int64_t>(p.cdf.size()) / (p.symbols + 1);
  quantize.values.dims = 1;
  quantize.values.shape[0] = quantize.values.rows;
  quantize.values.strides[0] = p.symbols;
  quantize.cdf = p.cdf.data();
  quantize.fault = &fault;
  pycore::quantize_cdf(quantize, pycore::Parallel{}, scratch_of(pycore::quantize_cdf_scratch(quantize, 1)));
  expect(fault == pycore::kNoFault, "good logits are refused");
  for (int32_t entry : p.cdf) p.cdf16.push_back(static_cast<uint16_t>(entry));
  for (int64_t i = 0; i < p.length; ++i) p.drawn.push_back(static_cast<int32_t>(draw(0, p.symbols - 1)));
  return p;
}

std::vector<uint8_t> encoded(const Problem& p) {
  pycore::EncodeParams params;
  params.symbol_dtype = DType::kInt32;
  params.symbols = p.drawn.data();
  params.position_stride = 1;
  params.streams = 1;
  params.length = p.length;
  params.lanes = p.lanes;
  params.model = p.model();
  pycore::StreamResult result;
  params.results = &result;
  const int64_t capacity = pycore::ac_encode_capacity(params);
  std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(capacity)]);
  params.memory = memory.get();
  pycore::ac_encode(params, pycore::Parallel{}, scratch_of(pycore::ac_encode_scratch(params, 1)));
  expect(result.fault == CoderFault::kNone, "good symbols are refused");
  std::vector<uint8_t> out(static_cast<size_t>(result.bytes));
  const int64_t offsets[2] = {0, result.bytes};
  pycore::ac_pack_streams(params, offsets, out.data(), pycore::Parallel{});
  return out;
}

// True: decoded without a fault. The symbols must be what was coded.
bool decodes(const Problem& p, const std::vector<uint8_t>& bytes) {
  const Exact stream(bytes);
  const int64_t offsets[2] = {0, stream.size};
  pycore::StreamResult result;
  pycore::Frame frame;
  pycore::DecodeParams params;
  params.data = stream.data.get();
  params.offsets = offsets;
  params.streams = 1;
  params.results = &result;
  params.frames = &frame;
  pycore::ac_open_streams(params, pycore::Parallel{});
  if (result.fault != CoderFault::kNone) return false;
  if (!p.fixed && result.count != p.length) return false;  // the faces' affair
  params.length = result.count;
  params.model = p.model();
  pycore::ac_check_claims(params, pycore::Parallel{}, scratch_of(pycore::ac_decode_scratch(params, 1)));
  if (result.fault != CoderFault::kNone) return false;
  // What may be claimed without a look; more was decoded, and cannot be what was coded.
  expect(!p.fixed || result.count <= (1 << 17) + 64 * stream.size, "a claim that the payload cannot hold is accepted");
  std::unique_ptr<int64_t[]> symbols(new int64_t[static_cast<size_t>(params.length)]);
  params.symbols = symbols.get();
  pycore::ac_decode(params, pycore::Parallel{}, scratch_of(pycore::ac_decode_scratch(params, 1)));
  ++decoded;
  for (int64_t i = 0; i < params.length; ++i) {
    expect(result.fault != CoderFault::kNone || (symbols[i] >= 0 && symbols[i] < p.symbols),
           "a symbol beyond the model");
  }
  if (result.fault != CoderFault::kNone) return false;
  bool same = params.length == p.length;
  for (int64_t i = 0; same && i < p.length; ++i) same = symbols[i] == p.drawn[static_cast<size_t>(i)];
  expect(same, "other symbols were handed back as right");
  return true;
}

// A frame that fits the bytes, so that damage gets past the first checks.
void forge(std::vector<uint8_t>* bytes) {
  if (bytes->size() < static_cast<size_t>(pycore::kFrameBytes)) return;
  if (draw(0, 3)) pycore::put_bytes(bytes->data() + 26, bytes->size() - pycore::kFrameBytes, 6);
  const uint32_t crc = pycore::frame_crc(bytes->data(), static_cast<int64_t>(bytes->size()), add);
  pycore::put_bytes(bytes->data() + pycore::kCrcOffset, crc, 4);
}

void damage(const Problem& p, const std::vector<uint8_t>& good) {
  std::vector<uint8_t> bad = good;
  const bool forged = draw(0, 2) == 0;
  switch (draw(0, 5)) {
    case 0: bad.resize(static_cast<size_t>(draw(0, static_cast<int64_t>(bad.size()) - 1))); break;
    case 1:
      for (int64_t n = draw(1, 9); n > 0; --n) bad.push_back(static_cast<uint8_t>(draw(0, 1) ? 0 : next()));
      break;
    case 2:
      for (size_t i = pycore::kFrameBytes; i < bad.size(); ++i) bad[i] = static_cast<uint8_t>(next());
      break;
    case 3: bad[static_cast<size_t>(draw(0, pycore::kFrameBytes - 1))] = static_cast<uint8_t>(next()); break;
    default:
      for (int64_t n = draw(1, 3); n > 0; --n) {
        const int64_t bit = draw(0, 8 * static_cast<int64_t>(bad.size()) - 1);
        bad[static_cast<size_t>(bit / 8)] ^= static_cast<uint8_t>(1 << bit % 8);
      }
  }
  if (forged) forge(&bad);
  const bool accepted = decodes(p, bad);
  expect(forged || bad == good || !accepted, "a damaged stream is accepted");
  ++cases;
}

// Rows of noise under a model_id, which is all that is compared: nothing may be read or written beside anything.
void noise(Problem p, const std::vector<uint8_t>& good) {
  for (int32_t& entry : p.cdf) entry = static_cast<int32_t>(next());
  for (uint16_t& entry : p.cdf16) entry = static_cast<uint16_t>(next());
  for (float& value : p.values) {
    const uint32_t bits = static_cast<uint32_t>(next());
    std::memcpy(&value, &bits, 4);
  }
  p.drawn.assign(p.drawn.size(), -1);
  const Exact stream(good);
  const int64_t offsets[2] = {0, stream.size};
  pycore::StreamResult result;
  pycore::Frame frame;
  pycore::DecodeParams params;
  params.data = stream.data.get();
  params.offsets = offsets;
  params.streams = 1;
  params.length = p.length;
  params.results = &result;
  params.frames = &frame;
  params.model = p.model();
  std::vector<int64_t> symbols(static_cast<size_t>(p.length));
  params.symbols = symbols.data();
  pycore::ac_open_streams(params, pycore::Parallel{});
  pycore::ac_decode(params, pycore::Parallel{}, scratch_of(pycore::ac_decode_scratch(params, 1)));
  ++cases;
}

// Bytes with adaptive models: whole, damaged and forged.
void adaptive() {
  std::vector<uint8_t> bytes(static_cast<size_t>(draw(0, 20)));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(draw(0, 3) ? draw(60, 70) : next());
  pycore::EncodeParams encode;
  encode.order = static_cast<int>(draw(0, 1));
  encode.symbols = bytes.data();
  encode.position_stride = 1;
  encode.streams = 1;
  encode.length = static_cast<int64_t>(bytes.size());
  pycore::StreamResult result;
  encode.results = &result;
  std::vector<uint8_t> stream(static_cast<size_t>(pycore::ac_encode_capacity(encode)));
  encode.memory = stream.data();
  pycore::ac_encode(encode, pycore::Parallel{}, scratch_of(pycore::ac_encode_scratch(encode, 1)));
  stream.resize(static_cast<size_t>(result.bytes));
  for (int i = 0; i < 8; ++i) {
    std::vector<uint8_t> bad = stream;
    if (i > 0 && draw(0, 4) == 0) bad.resize(static_cast<size_t>(draw(0, static_cast<int64_t>(bad.size()))));
    if (i > 0 && !bad.empty()) bad[static_cast<size_t>(next() % bad.size())] ^= static_cast<uint8_t>(draw(1, 255));
    if (i > 2) forge(&bad);
    const Exact exact(bad);
    const int64_t offsets[2] = {0, exact.size};
    pycore::Frame frame;
    pycore::DecodeParams params;
    params.adaptive = true;
    params.frames = &frame;
    params.data = exact.data.get();
    params.offsets = offsets;
    params.streams = 1;
    params.results = &result;
    pycore::ac_open_streams(params, pycore::Parallel{});
    bool accepted = result.fault == CoderFault::kNone;
    if (accepted) {
      params.length = result.count;
      pycore::ac_check_claims(params, pycore::Parallel{}, scratch_of(pycore::ac_decode_scratch(params, 1)));
      accepted = result.fault == CoderFault::kNone;
      expect(!accepted || result.count <= (1 << 20) + 256 * exact.size, "a claim of more bytes than it holds");
    }
    std::vector<uint8_t> out(static_cast<size_t>(accepted ? result.count : 0));
    if (accepted) {
      params.length = result.count;
      params.bytes = out.data();
      pycore::ac_decode(params, pycore::Parallel{}, scratch_of(pycore::ac_decode_scratch(params, 1)));
      accepted = result.fault == CoderFault::kNone;
    }
    expect(accepted || bad != stream, "good bytes are refused");
    expect(!accepted || out == bytes, "other bytes were handed back as right");
    ++cases;
  }
}

}  // namespace

int main() {
  const pycore::CpuIsa isa = pycore::cpu_isa();
  while (cases < kCases) {
    const Problem p = draw_problem();
    const std::vector<uint8_t> good = encoded(p);
    pycore::set_cpu_isa(pycore::CpuIsa::kScalar);
    expect(encoded(p) == good, "other bytes than the plain loops'");
    pycore::set_cpu_isa(isa);
    expect(decodes(p, good), "a good stream is refused");
    for (int i = 0; i < 60; ++i) damage(p, good);
    for (int i = 0; i < 4 && p.id; ++i) noise(p, good);
    if (draw(0, 9) == 0) adaptive();
  }
  std::printf("%ld cases, %ld of them decoded to the end\n", long(cases), long(decoded));
  return failures == 0 ? 0 : 1;
}
