// The kernels of kernels.h for one instruction set, RFKERNELS_ISA.
#include "adaln.h"
#include "optim.h"
#include "others.h"

#define TEXT(x) STRING(x)

namespace rfkernels {
namespace RFKERNELS_ISA {

extern const Kernels kernels = {
    TEXT(RFKERNELS_ISA), adaln,    gated_adaln,       gated_residual, adaln_backward, gated_residual_backward,
    rms_norm,            rms_norm_backward, gelu_backward, flow, squared_error, error_gradient, along, add, adamw,
};

}  // namespace RFKERNELS_ISA
}  // namespace rfkernels
