// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 against the known answers that come with Random123 (kat_vectors).
#include <pycore/philox.h>

#include <cstdio>

int main() {
  struct Known {
    pycore::PhiloxWords counter;
    uint64_t key;
    uint32_t words[4];
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       0xffffffffffffffff,
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      // The digits of pi; the key's first word is its low one.
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0x299f31d0a4093822,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& answer : known) {
    const pycore::PhiloxWords words = pycore::philox(answer.counter, answer.key);
    for (int i = 0; i < 4; ++i) {
      if (words.word[i] == answer.words[i]) continue;
      std::fprintf(stderr, "failed: key %016llx, word %d is %08x and must be %08x\n",
                   static_cast<unsigned long long>(answer.key), i, words.word[i], answer.words[i]);
      return 1;
    }
  }
  std::printf("3 known answers\n");
  return 0;
}
