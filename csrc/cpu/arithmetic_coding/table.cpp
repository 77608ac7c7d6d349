// SPDX-License-Identifier: Apache-2.0
// Parsing and decoding with a table of strings.
//
// A walk's step waits for the load of the step before it, so one walk leaves the machine idle most of the time. Eight
// segments of the text are walked together, each from its first byte as if a token started there. That is seldom so,
// but the parse from a token's start depends on nothing before it, and two parses of one text soon meet: from where the
// parse of everything before a segment first starts a token that the segment's own parse also starts, the segment's own
// is right. What comes out is the parse from the front, token for token.
#include <pycore/arithmetic_coding/table.h>
#include <pycore/cpu_isa.h>

#include <algorithm>
#include <cstring>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore {
namespace {

inline uint64_t token_of(uint64_t node) { return node >> kTokenShift & kTokenMask; }
inline uint64_t child(const uint64_t* trie, uint64_t node, uint64_t byte) { return trie[(node >> kBaseShift) + byte]; }
inline bool fits(uint64_t node, uint64_t byte) { return static_cast<uint16_t>(node) == byte; }

const CoderKernels& kernels() { return for_isa(cpu_isa(), scalar::coder, avx2::coder, avx512::coder); }

// Walks of kParseLanes segments of kLength bytes, a byte of each in turn. nodes: in, after the first byte of each; out,
// after the last. walked[lane * kLength + i] is the lane's node after byte i. The length is a constant, so that all
// nodes and addresses find room in registers.
template <int64_t kLength>
void walk_lanes(const TokenTable& table, const uint8_t* data, uint64_t* nodes, uint32_t* walked) {
  const uint64_t* const trie = table.trie;
  const uint64_t* const roots = table.roots;
  uint64_t node[kParseLanes];
  for (int64_t lane = 0; lane < kParseLanes; ++lane) {
    node[lane] = nodes[lane];
    walked[lane * kLength] = static_cast<uint32_t>(node[lane] >> kStartShift);
  }
  for (int64_t i = 1; i < kLength; ++i) {
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kParseLanes; ++lane) {
      const uint64_t byte = data[lane * kLength + i];
      uint64_t next = child(trie, node[lane], byte);
      // next = fits(next, byte) ? next : roots[byte]. Whether it does cannot be foreseen, so it must not be a branch.
      asm("cmpw %w[byte], %w[next]\n\tcmovneq %[root], %[next]"
          : [next] "+&r"(next)
          : [byte] "r"(byte), [root] "m"(roots[byte])
          : "cc");
      node[lane] = next;
      walked[lane * kLength + i] = static_cast<uint32_t>(next >> kStartShift);
    }
  }
  for (int64_t lane = 0; lane < kParseLanes; ++lane) nodes[lane] = node[lane];
}

struct Parse {
  const TokenTable& table;
  int64_t* out;
  uint64_t node = 0;  // of the token that is not yet out
  int64_t* (*put_tokens)(const uint32_t* walked, int64_t count, int64_t* out) = kernels().put_tokens;

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
  void join(const uint8_t* segment, int64_t length, const uint32_t* walked, uint64_t last) {
    for (int64_t i = 0; i < length; ++i) {
      if (!step(segment[i]) || (walked[i] & 1) == 0) continue;
      out = put_tokens(walked + i, length - i, out);
      node = last;
      return;
    }
  }

  template <int64_t kLength>
  void segments(const uint8_t* data, uint32_t* walked) {
    uint64_t nodes[kParseLanes];
    for (int64_t lane = 0; lane < kParseLanes; ++lane) nodes[lane] = table.roots[data[lane * kLength]];
    walk_lanes<kLength>(table, data, nodes, walked);
    for (int64_t lane = 0; lane < kParseLanes; ++lane) {
      join(data + lane * kLength, kLength, walked + lane * kLength, nodes[lane]);
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

}  // namespace

Status table_encode_longest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens,
                            int64_t* count, void* scratch) {
  *count = 0;
  if (bytes == 0) return {};
  uint32_t* walked = static_cast<uint32_t*>(scratch);
  Parse parse{table, tokens, table.roots[data[0]]};
  int64_t at = 1;
  for (; bytes - at >= kParseLanes * kParseSegment; at += kParseLanes * kParseSegment) {
    parse.segments<kParseSegment>(data + at, walked);
  }
  for (; bytes - at >= kParseLanes * kShortSegment; at += kParseLanes * kShortSegment) {
    parse.segments<kShortSegment>(data + at, walked);
  }
  for (; at < bytes; ++at) parse.step(data[at]);
  parse.finish(data + bytes);
  *count = parse.out - tokens;
  return {};
}

Status table_encode_fewest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens, int64_t* count,
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

int64_t table_likely_bytes(const TokenTable& table, const int64_t* tokens, int64_t count) {
  const int64_t step = (count + kSampled - 1) / kSampled;
  int64_t sum = 0, sampled = 0;
  for (int64_t i = 0; i < count; i += step, ++sampled) {
    const uint64_t token = static_cast<uint64_t>(tokens[i]);
    sum += token < static_cast<uint64_t>(table.count) ? table.lengths[token] : 0;
  }
  return step <= 1 ? sum
                   : static_cast<int64_t>(static_cast<double>(sum) / static_cast<double>(sampled) *
                                          static_cast<double>(count));
}

Status table_decode(const TokenTable& table, const int64_t* tokens, int64_t count, uint8_t* out, int64_t room,
                    int64_t* done, int64_t* bytes) {
  constexpr int kTogether = 4;
  const uint8_t* const strings = table.strings;
  const uint64_t all = static_cast<uint64_t>(table.count);  // a power of two
  uint8_t *const begin = out, *const end = out + room;
  int64_t i = 0;
  for (bool good = true; good && i < count;) {
    // Sixteen bytes are copied for each string, short as it may be.
    for (; i + kTogether <= count && end - out >= kTogether * kStringBytes; i += kTogether) {
      uint64_t any_token = 0, any_length = 0, lengths[kTogether];
      const uint8_t* entries[kTogether];
      // Read once: what is checked is what is used, whoever writes to them meanwhile.
      uint64_t some[kTogether];
      for (int k = 0; k < kTogether; ++k) any_token |= some[k] = static_cast<uint64_t>(tokens[i + k]);
      if (__builtin_expect(any_token >= all, 0)) break;
      for (int k = 0; k < kTogether; ++k) {
        entries[k] = strings + some[k] * kStringBytes;
        lengths[k] = entries[k][kShortString];
        any_length |= lengths[k];
      }
      if (__builtin_expect(any_length > kShortString, 0)) break;
      for (int k = 0; k < kTogether; ++k) {
        std::memcpy(out, entries[k], kStringBytes);
        out += lengths[k];
      }
    }
    // What stopped it, one by one: a long string, the end of the tokens or of the room, or a token that is none.
    for (const int64_t stop = std::min(count, i + kTogether); i < stop; ++i) {
      const uint64_t token = static_cast<uint64_t>(tokens[i]);
      good = token < all && end - out >= table.lengths[token];
      if (!good) break;
      const int64_t length = table.lengths[token];
      const uint8_t* from = strings + token * kStringBytes;
      if (from[kShortString] == kLongString) {
        uint64_t offset;
        std::memcpy(&offset, from, sizeof offset);
        from = table.pool + offset;
      }
      if (end - out > kMostStringBytes) {
        for (int64_t at = 0; at < length; at += kStringBytes) std::memcpy(out + at, from + at, kStringBytes);
      } else {
        std::memcpy(out, from, static_cast<size_t>(length));
      }
      out += length;
    }
  }
  *done = i;
  *bytes = out - begin;
  return {};
}

uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t bytes) { return ~kernels().crc(~crc, data, bytes); }

}  // namespace pycore
