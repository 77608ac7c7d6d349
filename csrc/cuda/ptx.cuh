// SPDX-License-Identifier: Apache-2.0
// The one place with inline assembly: half precision, products of tiles, and asynchronous copies, on sm_80 and newer.
// tests/native/cuda_emulation.h says the same in plain C++, so that the kernels can be run without a device.
#pragma once

#if !defined(PYCORE_CUDA_EMULATED)

#include <cstdint>

#define PYCORE_UNROLL _Pragma("unroll")
#define PYCORE_PRAGMA(text) _Pragma(#text)
#define PYCORE_UNROLL_BY(count) PYCORE_PRAGMA(unroll count)

namespace pycore {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Two floats rounded to nearest, the first in the low half.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <class T>
__device__ inline T from_float(float x) {
  return {static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

// 2^x within 2 ulp; 2^0 is 1 and 2^-inf is 0 exactly.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp; 1 / inf is 0.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Zero, which the compiler cannot know: an array indexed with it stays in memory.
__device__ inline int opaque_zero() {
  int zero;
  asm volatile("mov.s32 %0, 0;" : "=r"(zero));
  return zero;
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8). Lane l holds of c, with g = l / 4 and t = l % 4: rows g (c[0], c[1])
// and g + 8, columns 2 t and 2 t + 1; of a: rows g and g + 8 at k = 2 t, 2 t + 1, then both at k + 8; of b: column g.
template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of halves from shared memory: lane l brings the address, as a base and bytes, of row l % 8 of
// matrix l / 8 and gets, of each matrix, the halves of row l / 4 (transposed: column l / 4) at 2 (l % 4) and the next.
template <bool kTransposed>
__device__ inline void load_matrix(uint32_t (&r)[4], SharedAddress base, int bytes) {
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(base + bytes)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(base + bytes)
                 : "memory");
  }
}

// kBytes (4 or 16) to shared memory: `bytes` of them from global memory, the others zeros. Both addresses are multiples
// of kBytes.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 16, "what is used");
  if (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  }
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kOpen of the committed groups are under way.
template <int kOpen>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace
}  // namespace pycore

#endif  // PYCORE_CUDA_EMULATED
