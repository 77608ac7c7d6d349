// SPDX-License-Identifier: Apache-2.0
// The tensors that a side of a staircase cache is kept in, as views.
#pragma once

#include <vector>

#include "../host/staircase_cache_args.h"
#include "tensor.h"

namespace pycore {

inline std::vector<TensorView> storage_views(const std::vector<torch::stable::Tensor>& storage, const char* op,
                                             const char* argument) {
  check_value(storage.size() == kStorageTensors, op, argument, " has ", storage.size(), " tensors and must have ",
              kStorageTensors);
  std::vector<TensorView> out;
  for (const torch::stable::Tensor& tensor : storage) out.push_back(view(tensor, op, argument));
  return out;
}

}  // namespace pycore
