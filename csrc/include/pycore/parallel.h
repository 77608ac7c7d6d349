// SPDX-License-Identifier: Apache-2.0
// Threads belong to the caller. A kernel asks `Parallel` to run a body once per slot; slots claim work items from
// a shared counter, so that an uneven schedule or a busy core does not leave the others waiting. Which slot
// computes an item never changes the item's bits, and neither does the floating-point environment of a slot's thread.
#pragma once

#include <pycore/float_environment.h>

#include <atomic>
#include <cstdint>

namespace pycore {

// More slots than this, or than there are processors, would only ask for scratch.
inline constexpr int64_t kMostThreads = 256;

inline int64_t clamped_threads(int64_t asked, int64_t processors) {
  const int64_t most = processors > kMostThreads ? processors : kMostThreads;
  return asked < 1 ? 1 : asked < most ? asked : most;
}

struct Parallel {
  int64_t threads = 1;      // slots; scratch is sized for this many
  void* context = nullptr;  // the caller's
  // Runs body(argument, slot) for every slot in [0, slots), slots <= threads, and returns when all are done.
  void (*run)(void* context, int64_t slots, void (*body)(void* argument, int64_t slot), void* argument) = nullptr;
};

// The caller's threads, or one slot where there is too little work to wake a second thread for.
inline Parallel limited(const Parallel& parallel, int64_t work, int64_t least) {
  return work < least ? Parallel{} : parallel;
}

// Calls f(slot, item) for every item in [0, items).
template <class F>
void for_each_item(const Parallel& parallel, int64_t items, const F& f) {
  const int64_t slots = items < parallel.threads ? items : parallel.threads;
  if (slots <= 1 || parallel.run == nullptr) {
    const FixedFloats fixed;
    for (int64_t item = 0; item < items; ++item) f(int64_t{0}, item);
    return;
  }
  struct Claim {
    const F* f;
    int64_t items;
    std::atomic<int64_t> next{0};
  } claim{&f, items, {}};
  parallel.run(
      parallel.context, slots,
      [](void* argument, int64_t slot) {
        const FixedFloats fixed;
        Claim* claim = static_cast<Claim*>(argument);
        for (int64_t item = claim->next++; item < claim->items; item = claim->next++) (*claim->f)(slot, item);
      },
      &claim);
}

}  // namespace pycore
