// SPDX-License-Identifier: Apache-2.0
// What the programs here share that run a kernel on buffers of exactly the size its contract names, so that a sanitizer
// sees every read or write beside them, on one thread and on several.
#pragma once

#include <pycore/parallel.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace pycore::test {

inline uint32_t random_bits() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

// -1 to 1, times `size`.
inline float random_value(float size) {
  return static_cast<float>(static_cast<int32_t>(random_bits() >> 8) - (1 << 23)) * (size / (1 << 23));
}

// Exactly `count` values on the heap, each 77 below zero at first; a vector may have spare capacity that hides an
// overrun.
template <class T>
struct Buffer {
  explicit Buffer(int64_t size) : count(size), data(new T[static_cast<size_t>(size)]) {
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<T>(-77);
  }
  bool operator==(const Buffer& other) const {
    return std::memcmp(data.get(), other.data.get(), static_cast<size_t>(count) * sizeof(T)) == 0;
  }
  int64_t count;
  std::unique_ptr<T[]> data;
};

inline Buffer<float> random_floats(int64_t count, float size) {
  Buffer<float> buffer(count);
  for (int64_t i = 0; i < count; ++i) buffer.data[i] = random_value(size);
  return buffer;
}

// Threads that start anew for every call.
inline Parallel threads(int64_t count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
    std::vector<std::thread> team;
    for (int64_t slot = 0; slot < slots; ++slot) team.emplace_back(body, argument, slot);
    for (std::thread& thread : team) thread.join();
  };
  return parallel;
}

// 64-byte aligned, as contracts ask, with nothing behind it.
struct Scratch {
  explicit Scratch(int64_t bytes)
      : data(bytes > 0 ? ::operator new(static_cast<size_t>(bytes), std::align_val_t{64}) : nullptr) {}
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data;
};

}  // namespace pycore::test
