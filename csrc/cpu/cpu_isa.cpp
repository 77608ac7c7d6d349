// SPDX-License-Identifier: Apache-2.0
// Finds the best instruction set once, on first use. A CPU that has the instructions is not enough: the operating
// system must save the wide registers at a context switch too, which XCR0 (xgetbv) tells.
#include <cpuid.h>
#include <pycore/cpu_isa.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pycore {
namespace {

// Bits of cpuid leaf 1 (ecx), leaf 7 subleaf 0 (ebx) and leaf 0x80000001 (ecx). F16C, BMI1/2, LZCNT, SSE4.2 and POPCNT
// are asked for because the kernels' target regions name them beside AVX2.
constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
constexpr unsigned kSse42 = 1u << 20, kPopcnt = 1u << 23;
constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;
constexpr unsigned kAvx512f = 1u << 16, kAvx512dq = 1u << 17, kAvx512bw = 1u << 30, kAvx512vl = 1u << 31;
constexpr unsigned kLzcnt = 1u << 5;
// XCR0: the registers xmm and ymm; and for AVX-512 the masks, the upper halves of zmm0-15, and zmm16-31.
constexpr unsigned kYmmState = 0x6, kZmmState = 0xe6;

bool has_all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

unsigned read_xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

CpuIsa detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has_all(c, kFma | kOsxsave | kAvx | kF16c | kSse42 | kPopcnt))
    return CpuIsa::kScalar;
  const unsigned xcr0 = read_xcr0();
  if (!has_all(xcr0, kYmmState)) return CpuIsa::kScalar;
  if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !has_all(c, kLzcnt)) return CpuIsa::kScalar;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has_all(b, kBmi1 | kAvx2 | kBmi2)) return CpuIsa::kScalar;
  const bool avx512 = has_all(b, kAvx512f | kAvx512dq | kAvx512bw | kAvx512vl) && has_all(xcr0, kZmmState);
  return avx512 ? CpuIsa::kAvx512 : CpuIsa::kAvx2;
}

// cpuid leaf 7 subleaf 1 (eax).
constexpr unsigned kAvx512Bf16 = 1u << 5;

bool detect_bfloat16_products() {
  unsigned a, b, c, d;
  return detect() == CpuIsa::kAvx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_all(a, kAvx512Bf16);
}

struct Choice {
  CpuIsa available = detect();
  std::atomic<CpuIsa> used{available};
  bool wrong = false;
  char error[160] = {};

  Choice() {
    const char* asked = std::getenv("PYCORE_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return;
    CpuIsa isa;
    const bool known = parse_cpu_isa(asked, &isa);
    if (known && isa <= available) {
      used = isa;
      return;
    }
    wrong = true;
    if (known) {
      std::snprintf(error, sizeof(error), "PYCORE_CPU_ISA is %s, but this machine has %s at most: lower it or unset it",
                    asked, cpu_isa_name(available));
    } else {
      std::snprintf(error, sizeof(error), "PYCORE_CPU_ISA is '%.32s' and must be scalar, avx2 or avx512", asked);
    }
  }
};

Choice& choice() {
  static Choice instance;  // initialised once, by the first thread that asks
  return instance;
}

}  // namespace

CpuIsa cpu_isa_available() { return choice().available; }

CpuIsa cpu_isa() { return choice().used.load(std::memory_order_relaxed); }

bool cpu_has_bfloat16_products() {
  static const bool has = detect_bfloat16_products();
  return has;
}

bool set_cpu_isa(CpuIsa isa) {
  if (isa > choice().available) return false;
  choice().used.store(isa, std::memory_order_relaxed);
  return true;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kScalar: return "scalar";
    case CpuIsa::kAvx2: return "avx2";
    case CpuIsa::kAvx512: return "avx512";
  }
  return "unknown";
}

bool parse_cpu_isa(const char* name, CpuIsa* isa) {
  for (CpuIsa candidate : {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (std::strcmp(name, cpu_isa_name(candidate)) == 0) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

const char* cpu_isa_error() { return choice().wrong ? choice().error : nullptr; }

}  // namespace pycore
