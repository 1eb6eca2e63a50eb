// The CPU kernels of this machine.
#pragma once

#include <string>

#include "kernels.h"

namespace rfkernels {

// Takes those of an instruction set, "": the best that this CPU has. Returns its name.
std::string use_instructions(const std::string& name);

const Kernels& cpu_kernels();

}  // namespace rfkernels
