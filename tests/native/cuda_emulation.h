// SPDX-License-Identifier: Apache-2.0
// CUDA C++ on a CPU, for tests: csrc/cuda's sources compiled by g++, each thread of a block a fiber. Include before
// them.
//
// Threads take turns. What a warp or a block does together (barriers, shuffles, ldmatrix, mma) is a meeting: whoever
// comes waits, the last one computes for all. What is to show shows here, too:
//   - shared memory has exactly the size asked for, on the heap, and starts as NaN;
//   - an asynchronous copy leaves NaN until it is waited for, and must not be left open;
//   - threads in ascending or descending order (`emulation.reversed`) must give the same bits, or a barrier is missing;
//   - a thread that meets nobody, or meets others at another operation, ends the program.
// ex2.approx is exp2f, and a product of tiles adds in float32 in the order of k: a device's bits may differ.
#pragma once

#include <pycore/dtype.h>
#include <pycore/status.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define PYCORE_CUDA_EMULATED
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define PYCORE_UNROLL
#define PYCORE_UNROLL_BY(count)

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

// Stores the callee-saved registers on this stack and its top in *from, and goes on where `to` was stored.
extern "C" void pycore_switch_stack(void** from, void* to);
asm(R"(
.text
.type pycore_switch_stack, @function
pycore_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "failed: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Copy {
  char* to;
  const char* from;
  int bytes;  // of `size`; the others become 0
  int size;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* top = nullptr;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};

// Where threads meet. Everyone brings and takes at most 64 bytes.
struct Meeting {
  unsigned arrived = 0, size = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  alignas(16) unsigned char brought[kWarp][64], taken[kWarp][64];
};

struct Emulation {
  bool reversed = false;
  int64_t multiprocessors = 4, shared_limit = 227 << 10;

  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  bool any = false, any_taken = false;  // of __syncthreads_or
  std::function<void()> body;
  void* scheduler = nullptr;
  unsigned running = 0;
  bool progress = false;
  char* shared = nullptr;

  void resume(unsigned thread) {
    running = threadIdx.x = thread;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibers[thread].stack.get(), kStackBytes);
    pycore_switch_stack(&scheduler, fibers[thread].top);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    pycore_switch_stack(&scheduler, fibers[thread].top);
#endif
  }

  void yield() {
    Fiber& fiber = fibers[running];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, bottom, size);
    pycore_switch_stack(&fiber.top, scheduler);
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
#else
    pycore_switch_stack(&fiber.top, scheduler);
#endif
  }
  const void* bottom = nullptr;  // the scheduler's own stack
  size_t size = 0;

  void run_block(unsigned threads) {
    if (threads % kWarp != 0) fail("a block is whole warps");
    if (fibers.size() < threads) fibers.resize(threads);
    warps.assign(threads / kWarp, Meeting());
    for (Meeting& warp : warps) warp.size = kWarp;
    block = Meeting();
    block.size = threads;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.done = false;
      fiber.groups.assign(1, {});
      // Six registers, then where `ret` goes; on entry the stack is 8 past a multiple of 16.
      void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) / 16 * 16);
      *(top - 1) = nullptr;
      *(top - 2) = reinterpret_cast<void*>(&Emulation::enter);
      for (int i = 3; i <= 8; ++i) *(top - i) = nullptr;
      fiber.top = top - 8;
    }
    for (unsigned left = threads; left > 0;) {
      progress = false;
      for (unsigned n = 0; n < threads; ++n) {
        const unsigned t = reversed ? threads - 1 - n : n;
        if (fibers[t].done) continue;
        resume(t);
        if (!fibers[t].done) continue;
        progress = true;
        --left;
      }
      if (!progress) fail("threads wait for others that never come");
    }
  }

  static void enter();

  // Everyone's bytes go in, the last one computes what all take.
  template <class Compute>
  void meet(Meeting& meeting, const char* operation, Compute compute) {
    if (meeting.arrived > 0 && std::strcmp(meeting.operation, operation) != 0) fail("threads meet at other operations");
    meeting.operation = operation;
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
      compute();
      meeting.arrived = 0;
      ++meeting.generation;
      progress = true;
      return;
    }
    while (meeting.generation == generation) yield();
  }

  // compute(const In* of 32 lanes, Out* of 32 lanes).
  template <class Out, class In, class Compute>
  Out meet_warp(const char* operation, const In& in, Compute compute) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "Meeting holds 64 bytes a lane");
    Meeting& warp = warps[running / kWarp];
    const unsigned lane = running % kWarp;
    std::memcpy(warp.brought[lane], &in, sizeof(In));
    meet(warp, operation, [&] {
      In brought[kWarp];
      Out taken[kWarp] = {};
      for (unsigned l = 0; l < kWarp; ++l) std::memcpy(&brought[l], warp.brought[l], sizeof(In));
      compute(brought, taken);
      for (unsigned l = 0; l < kWarp; ++l) std::memcpy(warp.taken[l], &taken[l], sizeof(Out));
    });
    Out out;
    std::memcpy(&out, warp.taken[lane], sizeof(Out));
    return out;
  }
};

inline Emulation emulation;

inline void Emulation::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &emulation.bottom, &emulation.size);
#endif
  emulation.body();
  Fiber& fiber = emulation.fibers[emulation.running];
  for (const auto& group : fiber.groups) {
    if (!group.empty()) fail("an asynchronous copy was never waited for");
  }
  fiber.done = true;
  emulation.yield();
  std::abort();
}

template <class T>
T from_lane(const char* operation, T x, unsigned from) {
  struct In {
    T x;
    unsigned from;
  };
  return emulation.meet_warp<T>(operation, In{x, from}, [](const In* in, T* out) {
    for (unsigned l = 0; l < kWarp; ++l) out[l] = in[in[l].from % kWarp].x;
  });
}

inline void check_all(unsigned mask) {
  if (mask != 0xffffffffu) fail("a mask leaves lanes out");
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int from) {
  emulation::check_all(mask);
  return emulation::from_lane("__shfl_sync", x, static_cast<unsigned>(from));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  emulation::check_all(mask);
  return emulation::from_lane("__shfl_xor_sync", x, threadIdx.x % emulation::kWarp ^ static_cast<unsigned>(lanes));
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulation::check_all(mask);
  return emulation::emulation.meet_warp<unsigned>("__ballot_sync", vote, [](const bool* in, unsigned* out) {
    unsigned bits = 0;
    for (unsigned l = 0; l < emulation::kWarp; ++l) bits |= static_cast<unsigned>(in[l]) << l;
    for (unsigned l = 0; l < emulation::kWarp; ++l) out[l] = bits;
  });
}
inline unsigned __match_any_sync(unsigned mask, int x) {
  emulation::check_all(mask);
  return emulation::emulation.meet_warp<unsigned>("__match_any_sync", x, [](const int* in, unsigned* out) {
    for (unsigned l = 0; l < emulation::kWarp; ++l) {
      for (unsigned m = 0; m < emulation::kWarp; ++m) out[l] |= static_cast<unsigned>(in[l] == in[m]) << m;
    }
  });
}
inline void __syncwarp() {
  emulation::Emulation& all = emulation::emulation;
  all.meet(all.warps[all.running / emulation::kWarp], "__syncwarp", [] {});
}
inline void __syncthreads() {
  emulation::Emulation& all = emulation::emulation;
  all.meet(all.block, "__syncthreads", [] {});
}
inline int __syncthreads_or(int vote) {
  emulation::Emulation& all = emulation::emulation;
  all.any |= vote != 0;
  all.meet(all.block, "__syncthreads_or", [&] {
    all.any_taken = all.any;
    all.any = false;
  });
  return all.any_taken;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace pycore {

inline char* shared_memory() { return emulation::emulation.shared; }
inline int64_t multiprocessors() { return emulation::emulation.multiprocessors; }
inline int64_t shared_limit() { return emulation::emulation.shared_limit; }

inline Status clear_memory(void* memory, int64_t bytes, void*) {
  if (bytes > 0) std::memset(memory, 0, bytes);
  return {};
}

template <class... Params, class... Arguments>
Status launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared, void*,
              const Arguments&... arguments) {
  emulation::Emulation& all = emulation::emulation;
  if (shared > all.shared_limit) return {StatusCode::kCuda, "more shared memory than the device has"};
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  all.body = [&] { kernel(arguments...); };
  for (int64_t n = 0; n < blocks; ++n) {
    blockIdx.x = static_cast<unsigned>(all.reversed ? blocks - 1 - n : n);
    const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(128, (shared + 127) / 128 * 128 + 128),
                                                        std::free);
    all.shared = static_cast<char*>(memory.get());
    std::memset(all.shared, 0xff, shared);
    constexpr unsigned char kGuard = 0x5a;
    const int64_t whole = (shared + 127) / 128 * 128 + 128;
    std::memset(all.shared + shared, kGuard, whole - shared);
    all.run_block(static_cast<unsigned>(threads));
    for (int64_t i = shared; i < whole; ++i) {
      if (static_cast<unsigned char>(all.shared[i]) != kGuard) emulation::fail("shared memory was overrun");
    }
  }
  return {};
}

// ---- what csrc/cuda/ptx.cuh says in machine code
// ----------------------------------------------------------------------

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(Float16 x) { return float_from_float16(x.bits); }
inline float to_float(BFloat16 x) { return float_from_bfloat16(x.bits); }
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Float16 from_float<Float16>(float x) {
  return {float16_from_float(x)};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {bfloat16_from_float(x)};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline int opaque_zero() { return 0; }

// c (16 x 8, float32) += a (16 x 16) b (16 x 8); fragments as in the PTX manual's mma.m16n8k16.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
    float c[4];
  };
  struct Out {
    float c[4];
  };
  const In mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const Out out = emulation::emulation.meet_warp<Out>("mma", mine, [](const In* in, Out* taken) {
    float left[16][16], right[16][8];
    const auto half = [](uint32_t word, int k) { return to_float(T{static_cast<uint16_t>(word >> (16 * k))}); };
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) {
        for (int k = 0; k < 2; ++k) left[g + r % 2 * 8][2 * t + k + r / 2 * 8] = half(in[l].a[r], k);
      }
      for (int r = 0; r < 2; ++r) {
        for (int k = 0; k < 2; ++k) right[2 * t + k + r * 8][g] = half(in[l].b[r], k);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
        float sum = in[l].c[r];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        taken[l].c[r] = sum;
      }
    }
  });
  for (int r = 0; r < 4; ++r) c[r] = out.c[r];
}

// Four 8 x 8 matrices of halves; lane l brings the address of row l % 8 of matrix l / 8.
using SharedAddress = const char*;
inline SharedAddress shared_address(const void* shared) { return static_cast<SharedAddress>(shared); }
template <bool kTransposed>
void load_matrix(uint32_t (&r)[4], SharedAddress base, int bytes) {
  const void* row = base + bytes;
  struct Out {
    uint32_t r[4];
  };
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix from an address that is not aligned");
  const Out out = emulation::emulation.meet_warp<Out>("ldmatrix", row, [](const void* const* rows, Out* taken) {
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 4; ++m) {
        uint32_t word = 0;
        for (int k = 0; k < 2; ++k) {
          const int i = kTransposed ? 2 * (l % 4) + k : l / 4, j = kTransposed ? l / 4 : 2 * (l % 4) + k;
          word |= static_cast<uint32_t>(static_cast<const uint16_t*>(rows[8 * m + i])[j]) << (16 * k);
        }
        taken[l].r[m] = word;
      }
    }
  });
  for (int m = 0; m < 4; ++m) r[m] = out.r[m];
}

// kBytes to shared memory: `bytes` of them from global memory, the others zeros.
template <int kBytes>
void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0)
    emulation::fail("an asynchronous copy to an unaligned address");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    emulation::fail("an asynchronous copy from an unaligned address");
  }
  std::memset(shared, 0xff, kBytes);
  emulation::Fiber& fiber = emulation::emulation.fibers[emulation::emulation.running];
  fiber.groups.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, kBytes});
}
inline void copy_async_commit() { emulation::emulation.fibers[emulation::emulation.running].groups.emplace_back(); }
// Waits until at most `open` of the committed groups are under way.
template <int kOpen>
void copy_async_wait() {
  auto& groups = emulation::emulation.fibers[emulation::emulation.running].groups;
  while (groups.size() > kOpen + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace pycore
