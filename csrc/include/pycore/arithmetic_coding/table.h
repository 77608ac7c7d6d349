// SPDX-License-Identifier: Apache-2.0
// A table of 2^bits strings, each a token: text to tokens by the longest match or the fewest tokens, and back by
// lookup.
//
// For encoding, the strings are a trie in a double array: the child of a node along byte c is at trie[base + c], if the
// label there is c. Every node with children has a base of its own, so the label alone says whose child it is; nodes
// without children share base 0, whose 256 slots have a label that no byte is. Every single byte is a token, so a walk
// that cannot go on starts the next token with the byte it failed on, and each byte costs exactly one step. A node that
// is no token has all 256 children, so a walk never fails there; only the end of the text can leave one there.
//
// For decoding, a token's string and length are 16 bytes, copied whole.
#pragma once

#include <pycore/export.h>
#include <pycore/status.h>

#include <cstdint>

namespace pycore {

inline constexpr int kLeastTableBits = 8, kMostTableBits = 20;
inline constexpr int64_t kMostStringBytes = 255;
inline constexpr int64_t kStringBytes = 16;        // of a string's entry
inline constexpr int64_t kShortString = 15;        // the longest that is in its entry; the last byte is the length
inline constexpr uint8_t kLongString = 255;        // in place of the length: the entry has offset (8 bytes) and length
inline constexpr int64_t kMostParsed = INT32_MAX;  // bytes of text for the optimal parse, whose costs are int32

// A node of the trie: base << 40 | token << 16 | label.
inline constexpr uint64_t kNoLabel = 256, kTokenMask = (1 << 24) - 1, kNoToken = kTokenMask;
inline constexpr int kTokenShift = 16, kBaseShift = 40;
inline constexpr uint64_t kMostBases = uint64_t{1} << 24;
// The label of single bytes, which nobody goes to by label: that a token starts there. A walk writes its nodes down
// shifted by kStartShift, as 32 bits: whether a token starts, and the token.
inline constexpr uint64_t kStartLabel = 1 << 15;
inline constexpr int kStartShift = 15;

struct TokenTable {
  int64_t count = 0;                 // strings: 2^bits
  const uint64_t* trie = nullptr;    // double array, of nodes at depth 2 and more
  const uint64_t* roots = nullptr;   // [256], the nodes of single bytes
  const uint8_t* lengths = nullptr;  // [count]
  const uint8_t* strings = nullptr;  // [count, kStringBytes]
  const uint8_t* pool = nullptr;     // strings that are longer than kShortString, and kStringBytes more
};

// Scratch of table_encode_longest(). A segment is an odd number of cache lines, so that the lanes' text and nodes do
// not share the few places that a cache has for addresses a power of two apart.
inline constexpr int64_t kParseLanes = 8, kParseSegment = 17 * 64, kShortSegment = 3 * 64;
inline constexpr int64_t kParseScratch = kParseLanes * kParseSegment * int64_t{sizeof(uint32_t)};

// tokens [bytes], of which the first *count are written: the longest token, again and again.
PYCORE_API Status table_encode_longest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens,
                                       int64_t* count, void* scratch);

// As few tokens as can be; among these parses the one whose first token is longest, then the second, and so on.
// Scratch: 5 * (bytes + 1) bytes, aligned to 4; bytes <= kMostParsed.
PYCORE_API Status table_encode_fewest(const TokenTable& table, const uint8_t* data, int64_t bytes, int64_t* tokens,
                                      int64_t* count, void* scratch);

// About how many bytes the tokens stand for, by a sample of them: exact for up to kSampled tokens.
inline constexpr int64_t kSampled = 4096;
PYCORE_API int64_t table_likely_bytes(const TokenTable& table, const int64_t* tokens, int64_t count);

// Decodes into out[0 .. room) until all tokens are done, or one is none of the table's, or a string does not fit. *done
// tokens are then *bytes bytes; nothing is written past room.
PYCORE_API Status table_decode(const TokenTable& table, const int64_t* tokens, int64_t count, uint8_t* out,
                               int64_t room, int64_t* done, int64_t* bytes);

// CRC-32C.
PYCORE_API uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t bytes);

}  // namespace pycore
