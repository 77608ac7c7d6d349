// SPDX-License-Identifier: Apache-2.0
// The file of a table, and the table that the kernels read, made from it by the face. The file, little-endian:
//   0  magic "PCEI"                     8  CRC-32C of all bytes but these four
//   4  version                         12  bytes of all strings together (4 bytes)
//   5  bits                            16  lengths, one byte for each of the 2^bits tokens
//   6  zero (2 bytes)                      strings, one after another
#pragma once

#include <pycore/arithmetic_coding/table.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "arithmetic_coding_args.h"

namespace pycore {

inline constexpr size_t kTableHeader = 16;
inline constexpr uint8_t kTableVersion = 1;
inline constexpr char kTableMagic[] = "PCEI";

inline const uint8_t* bytes_of(const std::string& text) { return reinterpret_cast<const uint8_t*>(text.data()); }

inline uint32_t table_crc(const std::string& file) {
  const uint32_t crc = crc32c(0, bytes_of(file), 8);
  return crc32c(crc, bytes_of(file) + 12, static_cast<int64_t>(file.size()) - 12);
}

// The file of 2^bits strings.
inline std::string pack_table(const char* op, const std::vector<std::string>& strings) {
  int bits = kLeastTableBits;
  while (bits < kMostTableBits && size_t{1} << bits < strings.size()) ++bits;
  check_value(size_t{1} << bits == strings.size(), op, "strings has ", strings.size(),
              " entries and must have a power of two from 2^", kLeastTableBits, " to 2^", kMostTableBits);
  uint8_t header[kTableHeader] = {};
  std::memcpy(header, kTableMagic, 4);
  header[4] = kTableVersion;
  header[5] = static_cast<uint8_t>(bits);
  std::string lengths, joined;
  for (size_t i = 0; i < strings.size(); ++i) {
    check_value(!strings[i].empty() && strings[i].size() <= kMostStringBytes, op, "strings[", i, "] has ",
                strings[i].size(), " bytes and must have 1 to ", kMostStringBytes);
    lengths.push_back(static_cast<char>(strings[i].size()));
    joined += strings[i];
  }
  put_bytes(header + 12, joined.size(), 4);
  std::string file = std::string(reinterpret_cast<char*>(header), kTableHeader) + lengths + joined;
  put_bytes(header + 8, table_crc(file), 4);
  file.replace(8, 4, reinterpret_cast<char*>(header) + 8, 4);
  return file;
}

// Holds what a TokenTable points to. Reading a file checks all that the kernels rely on.
class TableOwner {
 public:
  TableOwner(const char* op, const std::string& file) {
    read(op, file);
    sort(op);
    store();
    build(op);
  }
  TableOwner(const TableOwner&) = delete;
  TableOwner& operator=(const TableOwner&) = delete;

  const TokenTable& table() const { return table_; }
  int bits() const { return bits_; }
  int64_t trie_bytes() const { return static_cast<int64_t>(trie_.size() * sizeof(uint64_t)); }
  std::string string(size_t token) const { return joined_.substr(starts_[token], lengths_[token]); }

 private:
  template <class... Parts>
  static void check_file(bool condition, const char* op, const Parts&... parts) {
    if (!condition) throw BitstreamError(detail::sentence(op, "the file ", parts...));
  }

  void read(const char* op, const std::string& file) {
    const uint8_t* bytes = bytes_of(file);
    const size_t known = std::min<size_t>(file.size(), 4);
    check_file(file.compare(0, known, kTableMagic, known) == 0, op, "is no table of pycore");
    check_file(file.size() >= kTableHeader, op, "is truncated");
    check_file(bytes[4] == kTableVersion, op, "has format version ", int{bytes[4]}, ", and this library reads ",
               int{kTableVersion});
    bits_ = bytes[5];
    const bool sizes = bits_ >= kLeastTableBits && bits_ <= kMostTableBits && bytes[6] == 0 && bytes[7] == 0;
    check_file(sizes, op, "is damaged: its header does not hold");
    const size_t count = size_t{1} << bits_, strings = get_bytes(bytes + 12, 4);
    check_file(file.size() >= kTableHeader + count + strings, op, "is truncated");
    check_file(file.size() == kTableHeader + count + strings, op, "has bytes after its end");
    check_file(table_crc(file) == get_bytes(bytes + 8, 4), op, "is damaged: its checksum does not hold");
    lengths_.assign(bytes + kTableHeader, bytes + kTableHeader + count);
    joined_ = file.substr(kTableHeader + count);
    starts_.resize(count + 1);
    for (size_t i = 0; i < count; ++i) {
      starts_[i + 1] = starts_[i] + lengths_[i];
      check_file(lengths_[i] > 0, op, "has an empty string for token ", i);
    }
    check_file(starts_[count] == strings, op, "has lengths that do not add up to its strings");
  }

  int compare(size_t a, size_t b) const {
    const int order = std::memcmp(&joined_[starts_[a]], &joined_[starts_[b]], std::min(lengths_[a], lengths_[b]));
    return order != 0 ? order : int{lengths_[a]} - int{lengths_[b]};
  }

  void sort(const char* op) {
    order_.resize(lengths_.size());
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [this](uint32_t a, uint32_t b) {
      const int order = compare(a, b);
      return order != 0 ? order < 0 : a < b;
    });
    for (size_t i = 1; i < order_.size(); ++i) {
      check_file(compare(order_[i - 1], order_[i]) != 0, op, "has one string for tokens ", order_[i - 1], " and ",
                 order_[i]);
    }
  }

  // What decoding reads.
  void store() {
    strings_.assign(lengths_.size() * kStringBytes, 0);
    for (size_t i = 0; i < lengths_.size(); ++i) {
      uint8_t* entry = &strings_[i * kStringBytes];
      const uint8_t* from = bytes_of(joined_) + starts_[i];
      entry[kShortString] = lengths_[i];
      if (lengths_[i] <= kShortString) {
        std::memcpy(entry, from, lengths_[i]);
      } else {
        const uint64_t offset = pool_.size();
        std::memcpy(entry, &offset, sizeof offset);
        entry[8] = lengths_[i];
        entry[kShortString] = kLongString;
        pool_.insert(pool_.end(), from, from + lengths_[i]);
      }
    }
    pool_.resize(pool_.size() + kStringBytes);
    pool_.shrink_to_fit();
    table_.count = static_cast<int64_t>(lengths_.size());
    table_.lengths = lengths_.data();
    table_.strings = strings_.data();
    table_.pool = pool_.data();
  }

  // A node: strings order_[first .. last) begin with its `depth` bytes; its entry is *place.
  struct Node {
    size_t first, last, depth, place;
  };

  uint8_t byte_at(size_t i, size_t depth) const { return static_cast<uint8_t>(joined_[starts_[order_[i]] + depth]); }

  // The token of a node, which is then no longer among its strings.
  uint64_t take_token(Node* node) const {
    if (node->first == node->last || lengths_[order_[node->first]] != node->depth) return kNoToken;
    return order_[node->first++];
  }

  // What begins with one byte more, in order of the byte.
  std::vector<Node> children(const Node& node) const {
    std::vector<Node> out;
    for (size_t i = node.first; i < node.last; ++i) {
      if (out.empty() || byte_at(i, node.depth) != byte_at(out.back().first, node.depth)) {
        out.push_back({i, i, node.depth + 1, 0});
      }
      out.back().last = i + 1;
    }
    return out;
  }

  // A base that no node has yet and whose slots for these bytes are free. Nodes with one child fill the holes that the
  // others leave. Either kind goes on near where the last of it was placed, so that the search stays short.
  size_t find_base(const std::vector<uint8_t>& bytes) {
    size_t& from = bytes.size() == 1 ? next_single_ : next_;
    for (size_t slot = from;; ++slot) {
      if (slot + 512 > trie_.size()) grow(2 * trie_.size());
      if (trie_[slot] != kNoLabel) {
        if (slot == from) ++from;
        continue;
      }
      const size_t base = slot - bytes[0];
      bool fits = !has_base_[base];
      for (size_t i = 1; fits && i < bytes.size(); ++i) fits = trie_[base + bytes[i]] == kNoLabel;
      if (!fits) continue;
      if (slot - from > 4096) from = slot - 2048;
      return base;
    }
  }

  void grow(size_t slots) {
    trie_.resize(slots, kNoLabel);
    has_base_.resize(slots);
  }

  void build(const char* op) {
    grow(1 << 12);
    roots_.assign(256, kStartLabel);
    std::vector<Node> queue = children({0, order_.size(), 0, 0});  // of the root, whose children lie apart
    check_file(queue.size() == 256, op, "lacks strings that begin with some byte");
    for (size_t byte = 0; byte < 256; ++byte) queue[byte].place = byte;
    size_t highest = 0;
    for (size_t next = 0; next < queue.size(); ++next) {
      Node node = queue[next];
      const bool root = next < 256;
      const uint64_t token = take_token(&node);
      check_file(!root || token != kNoToken, op, "lacks the string of the single byte ", node.place);
      std::vector<Node> below = children(node);
      check_file(token != kNoToken || below.size() == 256, op,
                 "lacks a string that others begin with, and not every byte may follow it");
      uint64_t base = 0;
      if (!below.empty()) {
        std::vector<uint8_t> bytes;
        for (const Node& each : below) bytes.push_back(byte_at(each.first, node.depth));
        base = find_base(bytes);
        has_base_[base] = true;
        highest = std::max<size_t>(highest, base);
        check_file(base < kMostBases, op, "has more strings than a trie of this library holds");
        for (size_t i = 0; i < below.size(); ++i) {
          below[i].place = base + bytes[i];
          trie_[below[i].place] = bytes[i];  // taken; the rest follows when the node's turn comes
        }
      }
      (root ? roots_ : trie_)[node.place] |= base << kBaseShift | token << kTokenShift;
      queue.insert(queue.end(), below.begin(), below.end());
    }
    trie_.resize(highest + 256, kNoLabel);
    trie_.shrink_to_fit();
    has_base_ = {};
    order_ = {};
    table_.trie = trie_.data();
    table_.roots = roots_.data();
  }

  int bits_ = 0;
  std::vector<uint8_t> lengths_, strings_, pool_;
  std::string joined_;
  std::vector<uint64_t> starts_;
  std::vector<uint32_t> order_;  // tokens in the order of their strings
  std::vector<uint64_t> trie_, roots_;
  std::vector<bool> has_base_;
  size_t next_ = 256, next_single_ = 256;  // the first 256 slots belong to base 0
  TokenTable table_;
};

}  // namespace pycore
