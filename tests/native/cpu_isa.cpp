// SPDX-License-Identifier: Apache-2.0
// The choice of instruction set and the hand-out of work items, from several threads. With --list, prints the
// instruction sets of this machine (the Makefile runs every program on each).
#include <pycore/cpu_isa.h>
#include <pycore/parallel.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "kernel_inputs.h"

namespace {

using pycore::test::threads;

constexpr pycore::CpuIsa kAll[] = {pycore::CpuIsa::kScalar, pycore::CpuIsa::kAvx2, pycore::CpuIsa::kAvx512};

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++failures;
}

void check_names() {
  for (pycore::CpuIsa isa : kAll) {
    pycore::CpuIsa parsed;
    expect(pycore::parse_cpu_isa(pycore::cpu_isa_name(isa), &parsed) && parsed == isa, "a name parses to its set");
  }
  pycore::CpuIsa untouched = pycore::CpuIsa::kAvx2;
  for (const char* name : {"", "AVX2", "avx", "avx5123"}) {
    expect(!pycore::parse_cpu_isa(name, &untouched), "an unknown name does not parse");
  }
  expect(untouched == pycore::CpuIsa::kAvx2, "an unknown name changes nothing");
}

void check_choice() {
  expect(pycore::cpu_isa_error() == nullptr, "PYCORE_CPU_ISA is one of --list");
  const pycore::CpuIsa before = pycore::cpu_isa();
  for (pycore::CpuIsa isa : kAll) {
    const bool available = isa <= pycore::cpu_isa_available();
    expect(pycore::set_cpu_isa(isa) == available, "what is available can be chosen");
    expect(!available || pycore::cpu_isa() == isa, "what was chosen is in use");
  }
  pycore::set_cpu_isa(before);
}

void check_items() {
  for (int64_t slots : {1, 2, 7}) {
    for (int64_t items : {0, 1, 5, 1000}) {
      std::vector<int> visits(static_cast<size_t>(items), 0);
      std::vector<int64_t> per_slot(static_cast<size_t>(slots), 0);
      pycore::for_each_item(threads(slots), items, [&](int64_t slot, int64_t item) {
        ++visits[static_cast<size_t>(item)];
        ++per_slot[static_cast<size_t>(slot)];
        if (pycore::cpu_isa() > pycore::cpu_isa_available()) std::abort();
      });
      int64_t total = 0;
      for (int64_t count : per_slot) total += count;
      expect(total == items, "the slots share the items");
      for (int visit : visits) expect(visit == 1, "every item is visited once");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (pycore::CpuIsa isa : kAll) {
      if (isa <= pycore::cpu_isa_available()) std::puts(pycore::cpu_isa_name(isa));
    }
    return 0;
  }
  check_names();
  check_choice();
  check_items();
  return failures == 0 ? 0 : 1;
}
