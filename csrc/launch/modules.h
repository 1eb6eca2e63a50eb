// Kernels of csrc/cuda, where nvcc has built them for this GPU: loaded by name from a binary and launched like Triton's.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "launch.h"

namespace rfkernels::launch {

// The binary for a device; set by Python before the first launch on it.
void binary_for(int device, const std::string& path);
// Launches a kernel that takes one struct.
void run_by_name(const std::string& name, const at::Tensor& like, Grid grid, unsigned threads, void* arguments);

}  // namespace rfkernels::launch
