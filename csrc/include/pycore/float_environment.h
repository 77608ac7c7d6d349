// SPDX-License-Identifier: Apache-2.0
// One floating-point environment for everything that is computed here: rounding to nearest, subnormal numbers kept, no
// exception trapped. Threads come with environments of their own (torch.set_flush_denormal, fesetround), which differ
// between a caller and the threads of a pool; bits must not depend on who computes them.
#pragma once

#include <cstdint>

namespace pycore {

// For as long as it lives, on its own thread. The caller's environment comes back as it was, its exception flags too:
// what a kernel raises is none of the caller's.
class FixedFloats {
 public:
  FixedFloats() {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    // The memory clobber keeps loads, and so all arithmetic on what is loaded, on its own side.
    const uint32_t fixed = 0x1f80;
    __asm__ volatile("stmxcsr %0" : "=m"(before_) : : "memory");
    __asm__ volatile("ldmxcsr %0" : : "m"(fixed) : "memory");
#endif
  }
  ~FixedFloats() {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    __asm__ volatile("ldmxcsr %0" : : "m"(before_) : "memory");
#endif
  }
  FixedFloats(const FixedFloats&) = delete;
  FixedFloats& operator=(const FixedFloats&) = delete;

 private:
  uint32_t before_ = 0;
};

// Inside FixedFloats, if wanted: subnormal numbers count as zero, operands and results, as they do for the instructions
// that multiply pairs of bfloat16, which ask no environment.
class FlushedFloats {
 public:
  explicit FlushedFloats(bool wanted) : wanted_(wanted) {
    if (wanted_) set(0x9fc0);
  }
  ~FlushedFloats() {
    if (wanted_) set(0x1f80);
  }
  FlushedFloats(const FlushedFloats&) = delete;
  FlushedFloats& operator=(const FlushedFloats&) = delete;

 private:
  static void set([[maybe_unused]] uint32_t environment) {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    __asm__ volatile("ldmxcsr %0" : : "m"(environment) : "memory");
#endif
  }
  bool wanted_;
};

}  // namespace pycore
