// SPDX-License-Identifier: Apache-2.0
// Tables of strings under the sanitizers: damaged and forged files, whose reader must refuse them or give a table that
// is whole; texts in buffers of exactly their size, parsed as a plain search parses them; and tokens that are anything.
#include <pycore/cpu_isa.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../csrc/host/arithmetic_coding_table_args.h"

namespace {

using pycore::TableOwner;
using pycore::TokenTable;

constexpr int64_t kCases = 60'000;  // on each instruction set
int64_t cases = 0, files = 0, read_files = 0, texts = 0, decoded = 0, failures = 0;
uint64_t state = 88172645463325252u;

uint64_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state >> 11;
}
int64_t draw(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
}
char draw_byte() { return static_cast<char>(draw(0, 3) ? draw(97, 99) : draw(0, 255)); }

void expect(bool good, const char* what) {
  if (!good && ++failures < 20) std::fprintf(stderr, "case %ld: %s\n", long(cases), what);
}

// Exactly `count`, so that the sanitizer sees what lies behind them.
template <class T>
struct Exact {
  explicit Exact(int64_t count) : size(count), data(new T[static_cast<size_t>(count)]) {}
  Exact(const T* from, int64_t count) : Exact(count) { std::copy(from, from + count, data.get()); }
  int64_t size;
  std::unique_ptr<T[]> data;
};

// 2^bits strings that can be a table: single bytes, what extends others by a byte, up to 255 of them, and now and then
// every extension of a string, which then gives its place up.
std::vector<std::string> draw_strings(int bits) {
  std::set<std::string> chosen;
  std::vector<std::string> out;
  const auto add = [&](const std::string& string) {
    if (chosen.insert(string).second) out.push_back(string);
  };
  for (int byte = 0; byte < 256; ++byte) add(std::string(1, static_cast<char>(byte)));
  const size_t limit = size_t{1} << bits;
  const bool freed = bits > 8 && draw(0, 2) == 0, deep = draw(0, 3) == 0;
  if (freed) {
    const std::string parent{draw_byte(), draw_byte()};
    for (int byte = 0; byte < 256; ++byte) add(parent + static_cast<char>(byte));
  }
  while (out.size() < limit) {
    const std::string& from = deep && draw(0, 9) ? out.back() : out[next() % out.size()];
    if (from.size() >= pycore::kMostStringBytes) {
      add(std::string(1, draw_byte()) + draw_byte());
      continue;
    }
    const std::string longer = from + draw_byte();
    const bool whole = longer.size() == 2 && freed && out[256].compare(0, 2, longer) == 0;
    if (!whole) add(longer);
  }
  for (size_t i = out.size() - 1; i > 0; --i) std::swap(out[i], out[next() % (i + 1)]);
  return out;
}

std::string draw_text(const std::vector<std::string>& strings) {
  const int64_t kind = draw(0, 19);
  const int64_t length = kind == 0 ? draw(9000, 24'000) : kind < 4 ? draw(1500, 4000) : draw(0, 120);
  std::string text;
  while (static_cast<int64_t>(text.size()) < length) {
    if (draw(0, 2)) {
      text += strings[next() % strings.size()];
    } else {
      text += draw_byte();
    }
  }
  text.resize(static_cast<size_t>(length));
  return text;
}

using Index = std::unordered_map<std::string, int64_t>;

std::vector<int64_t> plain_parse(const Index& index, const std::string& text, size_t longest) {
  std::vector<int64_t> out;
  for (size_t at = 0; at < text.size();) {
    size_t length = std::min(longest, text.size() - at);
    auto found = index.find(text.substr(at, length));
    while (found == index.end()) found = index.find(text.substr(at, --length));
    out.push_back(found->second);
    at += length;
  }
  return out;
}

// Decodes into `room` bytes exactly, and again where what is left begins.
std::string decode(const TokenTable& table, const Exact<int64_t>& tokens, int64_t room, int64_t* done) {
  std::string out;
  *done = 0;
  for (int64_t more = 1, bytes = 0; more > 0; *done += more) {
    const Exact<uint8_t> memory(room);
    const Exact<int64_t> rest(tokens.data.get() + *done, tokens.size - *done);
    pycore::table_decode(table, rest.data.get(), rest.size, memory.data.get(), room, &more, &bytes);
    out.append(reinterpret_cast<const char*>(memory.data.get()), static_cast<size_t>(bytes));
  }
  return out;
}

void check_text(const TableOwner& owner, const std::string& text, const Index* index, size_t longest) {
  const TokenTable& table = owner.table();
  const int64_t bytes = static_cast<int64_t>(text.size());
  const Exact<uint8_t> data(reinterpret_cast<const uint8_t*>(text.data()), bytes);
  int64_t counts[2];
  for (const bool fewest : {false, true}) {
    const Exact<int64_t> tokens(bytes);
    const Exact<uint64_t> scratch((fewest ? 5 * (bytes + 1) : pycore::kParseScratch) / 8 + 1);
    const auto run = fewest ? &pycore::table_encode_fewest : &pycore::table_encode_longest;
    int64_t* count = &counts[fewest];
    run(table, data.data.get(), bytes, tokens.data.get(), count, scratch.data.get());
    const Exact<int64_t> used(tokens.data.get(), *count);
    if (index && !fewest) {
      const std::vector<int64_t> plain = plain_parse(*index, text, longest);
      expect(static_cast<int64_t>(plain.size()) == *count && std::equal(plain.begin(), plain.end(), used.data.get()),
             "another parse than the plain search's");
    }
    const int64_t likely = pycore::table_likely_bytes(table, used.data.get(), *count);
    expect(*count > pycore::kSampled || likely == bytes, "the tokens' bytes are not what they are");
    int64_t done = 0;
    expect(decode(table, used, bytes, &done) == text && done == *count, "the tokens are another text");
    expect(decode(table, used, draw(255, 400), &done) == text && done == *count, "pieces are another text");
    ++cases, ++texts;
  }
  expect(counts[1] <= counts[0], "the fewest tokens are more than the longest matches");
}

// Tokens that are anything: what comes before the first that is none of the table's is decoded, and no more.
void check_tokens(const TableOwner& owner) {
  Exact<int64_t> tokens(draw(0, 40));
  int64_t good = tokens.size;
  std::string text;
  const bool any = draw(0, 1);
  for (int64_t i = 0; i < tokens.size; ++i) {
    int64_t token = draw(0, owner.table().count - 1);
    if (any && draw(0, 9) == 0) {
      token = draw(0, 1) ? static_cast<int64_t>(next() << 11) : draw(-2, 2) + (draw(0, 1) ? owner.table().count : 0);
    }
    tokens.data[static_cast<size_t>(i)] = token;
    if (token < 0 || token >= owner.table().count) good = std::min(good, i);
    if (good > i) text += owner.string(static_cast<size_t>(token));
  }
  int64_t done = 0;
  expect(decode(owner.table(), tokens, draw(255, 3000), &done) == text && done == good, "other tokens are decoded");
  pycore::table_likely_bytes(owner.table(), tokens.data.get(), tokens.size);
  ++cases, ++decoded;
}

void forge(std::string* file) {
  if (file->size() < pycore::kTableHeader) return;
  uint8_t crc[4];
  pycore::put_bytes(crc, pycore::table_crc(*file), 4);
  std::memcpy(&(*file)[8], crc, 4);
}

std::string damaged(const std::string& good) {
  std::string bad = good;
  const size_t count = size_t{1} << static_cast<uint8_t>(good[5]);
  switch (draw(0, 6)) {
    case 0: bad.resize(next() % bad.size()); break;
    case 1: bad.append(static_cast<size_t>(draw(1, 20)), static_cast<char>(next())); break;
    case 2: bad[next() % 16] = static_cast<char>(next()); break;
    case 3: bad[16 + next() % count] = static_cast<char>(draw(0, 3)); break;
    case 4: {  // two lengths whose sum stays
      char &a = bad[16 + next() % count], &b = bad[16 + next() % count];
      if (&a != &b) ++a, --b;
      break;
    }
    case 5: {  // strings of other bytes
      for (int64_t n = draw(1, 5); n > 0; --n) bad[16 + count + next() % (bad.size() - 16 - count)] = draw_byte();
      break;
    }
    default: bad[next() % bad.size()] = static_cast<char>(bad[next() % bad.size()] ^ 1 << draw(0, 7));
  }
  return bad;
}

void check_file(const std::string& good, const std::vector<std::string>& strings) {
  std::string bad = damaged(good);
  const bool forged = draw(0, 3) > 0;
  if (forged) forge(&bad);
  std::unique_ptr<TableOwner> owner;
  try {
    owner = std::make_unique<TableOwner>("table", bad);
  } catch (const pycore::BitstreamError&) {
  }
  ++cases, ++files;
  expect(owner == nullptr || forged || bad == good, "a damaged file is read");
  if (owner == nullptr) return;
  ++read_files;  // another table, and a whole one: every text comes back
  check_text(*owner, draw_text(strings), nullptr, 0);
  check_tokens(*owner);
}

}  // namespace

int main() {
  while (cases < kCases) {
    const int bits = static_cast<int>(draw(0, 19) ? draw(8, 10) : draw(11, 13));
    const std::vector<std::string> strings = draw_strings(bits);
    const std::string file = pycore::pack_table("table", strings);
    const TableOwner owner("table", file);
    Index index;
    size_t longest = 0;
    for (size_t i = 0; i < strings.size(); ++i) {
      index[strings[i]] = static_cast<int64_t>(i);
      longest = std::max(longest, strings[i].size());
      expect(owner.string(i) == strings[i], "a token's string is another");
    }
    for (int i = 0; i < 8; ++i) check_text(owner, draw_text(strings), &index, longest);
    for (int i = 0; i < 20; ++i) check_tokens(owner);
    for (int i = 0; i < (bits < 11 ? 12 : 2); ++i) check_file(file, strings);
  }
  std::printf("%ld cases: %ld files, of which %ld could be read, %ld parses, %ld runs of tokens\n", long(cases),
              long(files), long(read_files), long(texts), long(decoded));
  return failures == 0 ? 0 : 1;
}
