// SPDX-License-Identifier: Apache-2.0
// What a kernel says when it returns. Kernels never throw; the faces turn a Status into an exception.
#pragma once

namespace pycore {

enum class StatusCode : int {
  kOk = 0,
  kUnsupported = 1,  // this build or machine has no such kernel
  kCuda = 2,         // the CUDA runtime refused a launch
};

struct Status {
  StatusCode code = StatusCode::kOk;
  const char* message = "";  // static storage

  bool ok() const { return code == StatusCode::kOk; }
};

}  // namespace pycore
