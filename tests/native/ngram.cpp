// SPDX-License-Identifier: Apache-2.0
// The table of trigrams beside a map of vectors, on tables of one place, tables that become full, and tables of
// anything at all, which the kernels must stay within; with buffers of exactly the size the contract names, so that a
// sanitizer sees every read or write beside them.
#include <pycore/ngram/ngram.h>

#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "kernel_inputs.h"

namespace {

using pycore::kNgramMostScore;
using pycore::kNgramSlots;
using pycore::test::Buffer;
using pycore::test::random_bits;

int failures = 0;

void check(bool condition, const char* what, int64_t capacity, int64_t alphabet) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s, %ld places, %ld tokens\n", what, long(capacity), long(alphabet));
  ++failures;
}

// Skewed, so that pairs meet more successors than they keep.
int64_t draw(int64_t alphabet) {
  const int64_t x = random_bits() >> 12, y = random_bits() >> 12;
  return (x < y ? x : y) * alphabet >> 20;
}

struct Table {
  explicit Table(int64_t places)
      : capacity(places), keys(places), successors(places * kNgramSlots), scores(places * kNgramSlots) {
    for (int64_t i = 0; i < places; ++i) keys.data[i] = -1;
  }
  pycore::NgramTable arrays() const {
    pycore::NgramTable table;
    table.capacity = capacity;
    table.keys = keys.data.get();
    table.successors = successors.data.get();
    table.scores = scores.data.get();
    return table;
  }
  int64_t capacity;
  Buffer<int64_t> keys;
  Buffer<int32_t> successors, scores;
};

// What the table holds, in plain steps: of each pair the successors with their scores, the best first.
using Row = std::vector<std::pair<int64_t, int64_t>>;
using Pairs = std::map<std::pair<int64_t, int64_t>, Row>;

void add(Row* row, int64_t token, int64_t weight) {
  size_t slot = 0;
  while (slot < row->size() && (*row)[slot].first != token) ++slot;
  if (slot < row->size()) {
    weight += (*row)[slot].second;
  } else if (row->size() == size_t{kNgramSlots}) {
    if (weight < row->back().second) return;
    slot = row->size() - 1;
  } else {
    row->emplace_back();
  }
  if (weight > kNgramMostScore) weight = kNgramMostScore;
  row->erase(row->begin() + static_cast<int64_t>(slot));
  auto place = row->begin();
  while (place != row->end() && place - row->begin() < static_cast<int64_t>(slot) && place->second >= weight) ++place;
  row->insert(place, {token, weight});
}

// Of the pairs that are in a full table, those that came first.
void update(const Table& table, Pairs* pairs, int64_t rows, int64_t alphabet, int64_t base) {
  Buffer<int64_t> trigrams(3 * rows), weights(rows), result(2);
  int64_t fresh = 0, left_out = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < 3; ++k) trigrams.data[3 * i + k] = base + draw(alphabet);
    const int64_t choices[] = {0, 1, 2621, 40000, kNgramMostScore};
    weights.data[i] = choices[random_bits() >> 16 & 3] + (random_bits() >> 28 == 0 ? choices[4] - 40000 : 0);
    const auto key = std::make_pair(trigrams.data[3 * i], trigrams.data[3 * i + 1]);
    if (!pairs->count(key)) {
      if (static_cast<int64_t>(pairs->size()) == table.capacity) {
        ++left_out;
        continue;
      }
      ++fresh;
    }
    add(&(*pairs)[key], trigrams.data[3 * i + 2], weights.data[i]);
  }
  pycore::NgramUpdateParams params;
  params.table = table.arrays();
  params.rows = rows;
  params.trigrams = trigrams.data.get();
  params.weights = weights.data.get();
  params.result = result.data.get();
  failures += !pycore::ngram_update(params).ok();
  check(result.data[0] == fresh && result.data[1] == left_out, "counts", table.capacity, alphabet);
}

void look_up(const Table& table, const Pairs& pairs, int64_t alphabet, int64_t base) {
  const int64_t rows = static_cast<int64_t>(pairs.size()) + 3;
  Buffer<int64_t> contexts(2 * rows), successors(rows * kNgramSlots);
  Buffer<float> probs(rows * kNgramSlots);
  int64_t row = 0;
  for (const auto& pair : pairs) {
    contexts.data[2 * row] = pair.first.first;
    contexts.data[2 * row++ + 1] = pair.first.second;
  }
  for (; row < rows; ++row) {  // pairs that are nowhere
    contexts.data[2 * row] = base == 0 ? alphabet : 0;
    contexts.data[2 * row + 1] = row;
  }
  pycore::NgramLookupParams params;
  params.table = table.arrays();
  params.rows = rows;
  params.contexts = contexts.data.get();
  params.successors = successors.data.get();
  params.probs = probs.data.get();
  failures += !pycore::ngram_lookup(params).ok();
  for (int64_t i = 0; i < rows; ++i) {
    const auto found = pairs.find({contexts.data[2 * i], contexts.data[2 * i + 1]});
    for (int64_t slot = 0; slot < kNgramSlots; ++slot) {
      const bool there = found != pairs.end() && slot < static_cast<int64_t>(found->second.size());
      const int64_t token = there ? found->second[static_cast<size_t>(slot)].first : -1;
      const int64_t score = there ? found->second[static_cast<size_t>(slot)].second : 0;
      const int64_t at = i * kNgramSlots + slot;
      check(successors.data[at] == token && probs.data[at] == static_cast<float>(score) / 65536, "lookup",
            table.capacity, alphabet);
    }
  }
}

// Every node stands behind its parent, follows its parent's pair, and no two children of one are the same token.
void draft(const Table& table, const Pairs& pairs, int64_t first, int64_t second, int64_t nodes, int64_t depth) {
  Buffer<int64_t> tokens(nodes), parents(nodes);
  pycore::NgramDraftParams params;
  params.table = table.arrays();
  params.first = first;
  params.second = second;
  params.nodes = nodes;
  params.depth = depth;
  params.tokens = tokens.data.get();
  params.parents = parents.data.get();
  failures += !pycore::ngram_draft(params).ok();
  std::vector<int64_t> depths(static_cast<size_t>(nodes));
  std::vector<std::pair<int64_t, int64_t>> seen;
  bool ended = false;
  for (int64_t n = 0; n < nodes; ++n) {
    const int64_t token = tokens.data[n], parent = parents.data[n];
    ended = ended || token < 0;
    if (ended) {
      check(token == -1 && parent == -1, "what is behind the drafts", table.capacity, nodes);
      continue;
    }
    check(parent >= -1 && parent < n, "parents", table.capacity, nodes);
    if (parent < -1 || parent >= n) return;
    depths[static_cast<size_t>(n)] = parent < 0 ? 1 : depths[static_cast<size_t>(parent)] + 1;
    check(depths[static_cast<size_t>(n)] <= depth, "depth", table.capacity, nodes);
    const int64_t before = parent < 0 ? second : tokens.data[parent];
    const int64_t ahead = parent < 0 ? first : parents.data[parent] < 0 ? second : tokens.data[parents.data[parent]];
    const auto found = pairs.find({ahead, before});
    bool known = false;
    if (found != pairs.end()) {
      for (const auto& successor : found->second) known = known || successor.first == token;
    }
    check(known, "a draft that is no successor", table.capacity, nodes);
    for (const auto& other : seen) check(other != std::make_pair(parent, token), "drafts", table.capacity, nodes);
    seen.emplace_back(parent, token);
  }
  // A tree that has room left has every continuation that is likely at all.
  if (ended && depth > 0) {
    const auto found = pairs.find({first, second});
    int64_t likely = 0, children = 0;
    if (found != pairs.end()) {
      for (const auto& successor : found->second) likely += successor.second > 0;
    }
    for (const auto& node : seen) children += node.first == -1;
    check(children == likely, "children of the newest token", table.capacity, nodes);
  }
}

// Arrays that no update would have written: whatever they say, nothing else is read or written.
void anything(int64_t capacity) {
  const Table table(capacity);
  for (int64_t i = 0; i < capacity; ++i) {
    const int64_t pair = static_cast<int64_t>(random_bits() >> 29) << 31 | random_bits() >> 29;
    table.keys.data[i] = random_bits() >> 30 == 0 ? -static_cast<int64_t>(random_bits()) : pair;
  }
  for (int64_t i = 0; i < capacity * kNgramSlots; ++i) {
    const int32_t large = static_cast<int32_t>(random_bits());
    table.successors.data[i] = random_bits() >> 31 ? large : static_cast<int32_t>(random_bits() >> 29);
    table.scores.data[i] = random_bits() >> 31 ? static_cast<int32_t>(random_bits()) : 30000;
  }
  Buffer<int64_t> trigrams(3 * 64), weights(64), result(2), contexts(2 * 64), successors(64 * kNgramSlots);
  Buffer<float> probs(64 * kNgramSlots);
  Buffer<int64_t> tokens(256), parents(256);
  for (int64_t i = 0; i < trigrams.count; ++i) trigrams.data[i] = random_bits() >> 29;
  for (int64_t i = 0; i < contexts.count; ++i) contexts.data[i] = random_bits() >> 29;
  for (int64_t i = 0; i < weights.count; ++i) weights.data[i] = kNgramMostScore;
  pycore::NgramDraftParams drafts;
  drafts.table = table.arrays();
  drafts.first = 3;
  drafts.second = 5;
  drafts.nodes = drafts.depth = 256;
  drafts.tokens = tokens.data.get();
  drafts.parents = parents.data.get();
  failures += !pycore::ngram_draft(drafts).ok();
  pycore::NgramLookupParams lookup;
  lookup.table = table.arrays();
  lookup.rows = 64;
  lookup.contexts = contexts.data.get();
  lookup.successors = successors.data.get();
  lookup.probs = probs.data.get();
  failures += !pycore::ngram_lookup(lookup).ok();
  pycore::NgramUpdateParams update;
  update.table = table.arrays();
  update.rows = 64;
  update.trigrams = trigrams.data.get();
  update.weights = weights.data.get();
  update.result = result.data.get();
  failures += !pycore::ngram_update(update).ok();
  check(result.data[0] >= 0 && result.data[0] + result.data[1] <= 64, "counts of anything", capacity, 8);
}

}  // namespace

int main() {
  const struct {
    int64_t capacity, alphabet, rows, base;
  } cases[] = {{1, 1, 5, 0},        {1, 3, 40, 0},     {16, 3, 300, 0},
               {16, 9, 500, 0},     {64, 9, 3000, 0},  {64, 7, 900, pycore::kNgramMostToken - 6},
               {1024, 30, 9000, 7}, {8192, 200, 0, 0}, {8192, 90, 9000, 0}};
  for (const auto& c : cases) {
    const Table table(c.capacity);
    Pairs pairs;
    for (int64_t part = 0; part < 3; ++part) update(table, &pairs, c.rows / 3, c.alphabet, c.base);
    look_up(table, pairs, c.alphabet, c.base);
    int64_t tried = 0;
    for (const auto& pair : pairs) {
      for (const int64_t nodes : {0, 1, 24, 256}) {
        for (const int64_t depth : {0, 1, 8, 256})
          draft(table, pairs, pair.first.first, pair.first.second, nodes, depth);
      }
      if (++tried == 40) break;
    }
    draft(table, pairs, c.base, pycore::kNgramMostToken, 24, 8);
  }
  for (int64_t turn = 0; turn < 200; ++turn) anything(int64_t{1} << turn % 9);
  return failures == 0 ? 0 : 1;
}
