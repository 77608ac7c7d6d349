// SPDX-License-Identifier: Apache-2.0
// The table of trigrams. A lookup is one cache miss, which no vector makes faster, so there is one version.
#include <pycore/ngram/ngram.h>

namespace pycore {
namespace {

constexpr int64_t kEmpty = -1;

int64_t pair_key(int64_t first, int64_t second) { return first << 31 | second; }

// Where the pair is, or where it would be (an empty place); -1 if it is nowhere and there is no room.
int64_t find(const NgramTable& table, int64_t key) {
  const uint64_t mask = static_cast<uint64_t>(table.capacity) - 1;
  uint64_t place = (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u >> 20) & mask;
  for (int64_t step = 0; step < table.capacity; ++step, place = (place + 1) & mask) {
    if (table.keys[place] == key || table.keys[place] == kEmpty) return static_cast<int64_t>(place);
  }
  return -1;
}

// The place of the pair, or -1.
int64_t find_pair(const NgramTable& table, int64_t first, int64_t second) {
  const int64_t place = find(table, pair_key(first, second));
  return place >= 0 && table.keys[place] != kEmpty ? place : -1;
}

void add(int32_t* successors, int32_t* scores, int32_t token, int64_t weight) {
  int64_t slot = 0;
  while (slot < kNgramSlots - 1 && successors[slot] >= 0 && successors[slot] != token) ++slot;
  if (successors[slot] == token) {
    weight += scores[slot];
  } else if (successors[slot] >= 0 && weight < scores[slot]) {
    return;
  }
  const int32_t score = static_cast<int32_t>(weight < kNgramMostScore ? weight : kNgramMostScore);
  for (; slot > 0 && scores[slot - 1] < score; --slot) {
    successors[slot] = successors[slot - 1];
    scores[slot] = scores[slot - 1];
  }
  successors[slot] = token;
  scores[slot] = score;
}

double probability(int32_t score) {
  constexpr double kUnit = 1.0 / 65536, kMost = 1.0 - 1.0 / 1024;
  const double p = score * kUnit;
  return p < kMost ? p : kMost;
}

}  // namespace

Status ngram_update(const NgramUpdateParams& params) {
  const NgramTable& table = params.table;
  int64_t fresh = 0, left_out = 0;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t* trigram = params.trigrams + 3 * row;
    const int64_t key = pair_key(trigram[0], trigram[1]), place = find(table, key);
    if (place < 0) {
      ++left_out;
      continue;
    }
    int32_t* successors = table.successors + place * kNgramSlots;
    int32_t* scores = table.scores + place * kNgramSlots;
    if (table.keys[place] == kEmpty) {
      ++fresh;
      table.keys[place] = key;
      for (int64_t slot = 0; slot < kNgramSlots; ++slot) {
        successors[slot] = -1;
        scores[slot] = 0;
      }
    }
    add(successors, scores, static_cast<int32_t>(trigram[2]), params.weights[row]);
  }
  params.result[0] = fresh;
  params.result[1] = left_out;
  return {};
}

Status ngram_lookup(const NgramLookupParams& params) {
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t place = find_pair(params.table, params.contexts[2 * row], params.contexts[2 * row + 1]);
    for (int64_t slot = 0; slot < kNgramSlots; ++slot) {
      const int64_t from = place * kNgramSlots + slot, to = row * kNgramSlots + slot;
      params.successors[to] = place < 0 ? -1 : params.table.successors[from];
      params.probs[to] = place < 0 ? 0.0f : static_cast<float>(params.table.scores[from]) * (1.0f / 65536);
    }
  }
  return {};
}

Status ngram_draft(const NgramDraftParams& params) {
  // Node -1 is the newest token; it stands at 0 here, node n at n + 1.
  int64_t places[kNgramMostNodes + 1], depths[kNgramMostNodes + 1], next[kNgramMostNodes + 1] = {};
  double path[kNgramMostNodes + 1];
  places[0] = find_pair(params.table, params.first, params.second);
  depths[0] = 0;
  path[0] = 1.0;
  int64_t count = 0;
  for (; count < params.nodes; ++count) {
    int64_t best = -1;
    double most = 0.0;
    for (int64_t n = 0; n <= count; ++n) {
      if (places[n] < 0 || next[n] == kNgramSlots || depths[n] >= params.depth) continue;
      const int64_t slot = places[n] * kNgramSlots + next[n];
      if (params.table.successors[slot] < 0) continue;
      const double p = path[n] * probability(params.table.scores[slot]);
      if (p > most) {
        most = p;
        best = n;
      }
    }
    if (best < 0) break;
    const int64_t token = params.table.successors[places[best] * kNgramSlots + next[best]++];
    params.tokens[count] = token;
    params.parents[count] = best - 1;
    depths[count + 1] = depths[best] + 1;
    path[count + 1] = most;
    const int64_t before = best == 0 ? params.second : params.tokens[best - 1];
    places[count + 1] = find_pair(params.table, before, token);
  }
  for (int64_t n = count; n < params.nodes; ++n) params.tokens[n] = params.parents[n] = -1;
  return {};
}

}  // namespace pycore
