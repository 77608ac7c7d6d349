// SPDX-License-Identifier: Apache-2.0
// Parsing and decoding with a table of strings.
//
// A walk's step waits for the load of the step before it, so one walk leaves the machine idle most of the time. Eight
// segments of the text are walked together, each from its first byte as if a token started there. That is seldom so,
// but the parse from a token's start depends on nothing before it, and two parses of one text soon meet: from where the
// parse of everything before a segment first starts a token that the segment's own parse also starts, the segment's own
// is right. What comes out is the parse from the front, token for token.
#include <pycore/arithmetic_coding_table.h>
#include <pycore/cpu_isa.h>

#include <algorithm>
#include <cstring>

#include "arithmetic_coding_kernels.h"

namespace pycore {
namespace {

inline uint64_t token_of(uint64_t node) { return node >> kTokenShift & kTokenMask; }
inline uint64_t child(const uint64_t* trie, uint64_t node, uint64_t byte) { return trie[(node >> kBaseShift) + byte]; }
inline bool fits(uint64_t node, uint64_t byte) { return static_cast<uint16_t>(node) == byte; }

// Walks of kParseLanes segments of `length` bytes, a byte of each in turn. nodes: in, after the first byte of each;
// out, after the last. A token goes out when a byte does not fit it any more; above its 24 bits it has some of the
// base.
void walk_lanes(const TokenTable& table, const uint8_t* data, int64_t length, uint64_t* nodes, uint32_t* tokens,
                int64_t* counts) {
  const uint64_t* const trie = table.trie;
  const uint64_t* const roots = table.roots;
  uint64_t node[kParseLanes];
  uint32_t* out[kParseLanes];
  for (int64_t lane = 0; lane < kParseLanes; ++lane) {
    node[lane] = nodes[lane];
    out[lane] = tokens + lane * kParseSegment;
  }
  for (int64_t i = 1; i < length; ++i) {
    const uint8_t* text = data + i;
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kParseLanes; ++lane, text += length) {
      const uint64_t byte = *text, next = child(trie, node[lane], byte);
      // Whether the byte fits cannot be foreseen, so it must not become a branch; `other` is 0 or all ones, and the
      // compiler does not know.
      const uint64_t root = roots[byte];
      uint64_t other = -static_cast<uint64_t>(!fits(next, byte));
      asm("" : "+r"(other));
      *out[lane] = static_cast<uint32_t>(node[lane] >> kTokenShift);
      out[lane] -= static_cast<int64_t>(other);
      node[lane] = next ^ ((next ^ root) & other);
    }
  }
  for (int64_t lane = 0; lane < kParseLanes; ++lane) {
    nodes[lane] = node[lane];
    counts[lane] = out[lane] - (tokens + lane * kParseSegment);
  }
}

struct Parse {
  const TokenTable& table;
  int64_t* out;
  uint64_t node = 0;  // of the token that is not yet out

  bool step(uint64_t byte) {  // whether a token went out, and the next starts with `byte`
    const uint64_t next = child(table.trie, node, byte);
    if (fits(next, byte)) {
      node = next;
      return false;
    }
    *out++ = static_cast<int64_t>(token_of(node));
    node = table.roots[byte];
    return true;
  }

  // Goes on into a segment that was walked by itself: until both start a token at one place, and then takes over what
  // is left of it. last: the node after the segment's own walk.
  void join(const uint8_t* segment, int64_t length, const uint32_t* tokens, int64_t count, uint64_t last) {
    int64_t own = 0, start = 0;  // the segment's token `own` starts at `start`; token `count` is not out yet
    for (int64_t i = 0; i < length; ++i) {
      if (!step(segment[i])) continue;
      while (start < i && own < count) start += table.lengths[tokens[own++] & kTokenMask];
      if (start != i) continue;
      for (; own < count; ++own) *out++ = static_cast<int64_t>(tokens[own] & kTokenMask);
      node = last;
      return;
    }
  }

  // The text ends. Where that leaves the walk at a node that is no token, the longest token before it goes out, and
  // what is left is parsed again.
  void finish(const uint8_t* end) {
    while (token_of(node) == kNoToken) {
      // How deep the walk is: its bytes are the last ones, and no token starts earlier that could end here.
      int64_t depth = 1;
      for (;; ++depth) {
        uint64_t other = table.roots[end[-depth]];
        int64_t i = 1;
        for (; i < depth; ++i) {
          const uint64_t byte = end[i - depth], next = child(table.trie, other, byte);
          if (!fits(next, byte)) break;
          other = next;
        }
        if (i == depth && other == node) break;
      }
      const uint8_t* at = end - depth;
      uint64_t other = table.roots[*at];
      uint64_t token = token_of(other);
      int64_t taken = 1;
      for (int64_t i = 1; i < depth; ++i) {
        other = child(table.trie, other, at[i]);
        if (token_of(other) != kNoToken) {
          token = token_of(other);
          taken = i + 1;
        }
      }
      *out++ = static_cast<int64_t>(token);
      at += taken;
      node = table.roots[*at];  // a token of the walk's own length would have ended it
      for (++at; at < end; ++at) step(*at);
    }
    *out++ = static_cast<int64_t>(token_of(node));
  }
};

constexpr int64_t kShortSegment = 256;  // bytes below which walking together is not worth joining

}  // namespace

Status encode_longest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens, int64_t* count,
                      void* scratch) {
  *count = 0;
  if (bytes == 0) return {};
  uint32_t* lane_tokens = static_cast<uint32_t*>(scratch);
  Parse parse{table, tokens, table.roots[data[0]]};
  int64_t at = 1;
  while (bytes - at >= kParseLanes * kShortSegment) {
    const int64_t length = std::min(kParseSegment, (bytes - at) / kParseLanes);
    uint64_t nodes[kParseLanes];
    int64_t counts[kParseLanes];
    for (int64_t lane = 0; lane < kParseLanes; ++lane) nodes[lane] = table.roots[data[at + lane * length]];
    walk_lanes(table, data + at, length, nodes, lane_tokens, counts);
    for (int64_t lane = 0; lane < kParseLanes; ++lane) {
      parse.join(data + at + lane * length, length, lane_tokens + lane * kParseSegment, counts[lane], nodes[lane]);
    }
    at += kParseLanes * length;
  }
  for (; at < bytes; ++at) parse.step(data[at]);
  parse.finish(data + bytes);
  *count = parse.out - tokens;
  return {};
}

Status encode_fewest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens, int64_t* count,
                     void* scratch) {
  int32_t* cost = static_cast<int32_t*>(scratch);  // [bytes + 1], tokens from here to the end
  uint8_t* taken = reinterpret_cast<uint8_t*>(cost + bytes + 1);
  cost[bytes] = 0;
  for (int64_t i = bytes - 1; i >= 0; --i) {
    uint64_t node = table.roots[data[i]];
    int32_t best = cost[i + 1];
    uint8_t length = 1;
    for (int64_t end = i + 1; end < bytes; ++end) {
      const uint64_t next = child(table.trie, node, data[end]);
      if (!fits(next, data[end])) break;
      node = next;
      if (cost[end + 1] <= best && token_of(node) != kNoToken) {
        best = cost[end + 1];
        length = static_cast<uint8_t>(end + 1 - i);
      }
    }
    cost[i] = best + 1;
    taken[i] = length;
  }
  *count = 0;
  for (int64_t i = 0; i < bytes; i += taken[i]) {
    uint64_t node = table.roots[data[i]];
    for (int64_t j = 1; j < taken[i]; ++j) node = child(table.trie, node, data[i + j]);
    tokens[(*count)++] = static_cast<int64_t>(token_of(node));
  }
  return {};
}

int64_t decoded_bytes(const TokenTable& table, const int64_t* tokens, int64_t count, int64_t* bad) {
  constexpr int64_t kBlock = 1024;
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    uint64_t any = 0;  // count is a power of two
    for (int64_t i = begin; i < end; ++i) any |= static_cast<uint64_t>(tokens[i]);
    if (any >= static_cast<uint64_t>(table.count)) {
      *bad = begin;
      while (static_cast<uint64_t>(tokens[*bad]) < static_cast<uint64_t>(table.count)) ++*bad;
      return -1;
    }
    int64_t sums[4] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      for (int64_t k = 0; k < 4; ++k) sums[k] += table.lengths[tokens[i + k]];
    }
    for (; i < end; ++i) sums[0] += table.lengths[tokens[i]];
    bytes += sums[0] + sums[1] + sums[2] + sums[3];
  }
  return bytes;
}

Status decode_tokens(const TokenTable& table, const int64_t* tokens, int64_t count, uint8_t* out, int64_t bytes) {
  constexpr int kTogether = 4;
  const uint8_t* const strings = table.strings;
  uint8_t* const end = out + bytes;
  int64_t i = 0;
  // Sixteen bytes are copied for each string, short as it may be; the last tokens, which may have fewer left, come
  // afterwards. A long string stops the four it is among, and goes by itself.
  while (i + kTogether <= count && end - out >= kTogether * kStringBytes) {
    const uint8_t* entries[kTogether];
    uint64_t lengths[kTogether];
    uint64_t any = 0;
    for (int k = 0; k < kTogether; ++k) {
      entries[k] = strings + tokens[i + k] * kStringBytes;
      lengths[k] = entries[k][kShortString];
      any |= lengths[k];
    }
    if (__builtin_expect(any <= kShortString, 1)) {
      for (int k = 0; k < kTogether; ++k) {
        std::memcpy(out, entries[k], kStringBytes);
        out += lengths[k];
      }
      i += kTogether;
      continue;
    }
    for (int k = 0; k < kTogether && end - out > kMostStringBytes; ++k, ++i) {
      if (lengths[k] == kLongString) {
        uint64_t offset;
        std::memcpy(&offset, entries[k], sizeof offset);
        const uint8_t* from = table.pool + offset;
        const int64_t length = entries[k][8];
        for (int64_t done = 0; done < length; done += kStringBytes) std::memcpy(out + done, from + done, kStringBytes);
        out += length;
      } else {
        std::memcpy(out, entries[k], kStringBytes);
        out += lengths[k];
      }
    }
    if (end - out < kMostStringBytes + kStringBytes) break;
  }
  for (; i < count; ++i) {
    const uint8_t* from = strings + tokens[i] * kStringBytes;
    if (from[kShortString] == kLongString) {
      uint64_t offset;
      std::memcpy(&offset, from, sizeof offset);
      from = table.pool + offset;
    }
    std::memcpy(out, from, table.lengths[tokens[i]]);
    out += table.lengths[tokens[i]];
  }
  return {};
}

uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t bytes) {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return ~avx512::coder.crc(~crc, data, bytes);
    case CpuIsa::kAvx2: return ~avx2::coder.crc(~crc, data, bytes);
    case CpuIsa::kScalar: break;
  }
  return ~scalar::coder.crc(~crc, data, bytes);
}

}  // namespace pycore
