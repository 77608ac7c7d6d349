// SPDX-License-Identifier: Apache-2.0
// The `threads=` argument of pycore.native: a team of std::threads for one call. Where torch is at work its own pool
// is used instead (csrc/torch/tensor.h).
#pragma once

#include <pycore/parallel.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "../host/checks.h"
#include "numbers.h"

namespace pycore::python {

// `threads` slots, or one for each processor this process may run on; clamped_threads() says how many at most.
inline Parallel thread_parallel(const py::handle& given, const char* op) {
  const std::optional<int64_t> threads = optional_integer(given, op, "threads");
  check_value(threads.value_or(1) >= 1, op, "threads is ", threads.value_or(1), " and must be at least 1");
  Parallel parallel;
  // Scratch is sized for all of them, so a number that no machine has must not come through.
  const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  parallel.threads = clamped_threads(threads.value_or(processors), processors);
  parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
    std::vector<std::thread> team;
    team.reserve(static_cast<size_t>(slots - 1));
    int64_t started = 1;  // slot 0 is the calling thread's
    try {
      for (; started < slots; ++started) team.emplace_back(body, argument, started);
    } catch (const std::system_error&) {
      // The system gives no more threads: the calling thread takes the remaining slots itself.
    }
    body(argument, 0);
    for (int64_t slot = started; slot < slots; ++slot) body(argument, slot);
    for (std::thread& thread : team) thread.join();
  };
  return parallel;
}

}  // namespace pycore::python
