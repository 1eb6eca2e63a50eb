// The kernels of this folder by name: what a driver loads. One for each dtype and width; "any" takes every other width.
#include "adaln.h"
#include "others.h"

#define ADALN(KIND, TAG, CHANNELS, THREADS, NAME)                                                               \
  KERNEL __launch_bounds__(THREADS, 1) adaln_backward_##TAG##_##NAME(const rfkernels::cuda::AdalnBackward a) {      \
    rfkernels::cuda::adaln_backward<rfkernels::cuda::KIND, CHANNELS, THREADS, false>(a);                         \
  }                                                                                                              \
  KERNEL __launch_bounds__(THREADS, 1) gated_adaln_backward_##TAG##_##NAME(const rfkernels::cuda::AdalnBackward a) { \
    rfkernels::cuda::adaln_backward<rfkernels::cuda::KIND, CHANNELS, THREADS, true>(a);                          \
  }

#define QK_NORM(KIND, TAG, DIM, LANES, NAME)                                                                    \
  KERNEL __launch_bounds__(128, 1) qk_norm_forward_##TAG##_##NAME(const rfkernels::cuda::QkNorm a) {                \
    rfkernels::cuda::qk_norm_forward<rfkernels::cuda::KIND, DIM, LANES, 128>(a);                                 \
  }                                                                                                              \
  KERNEL __launch_bounds__(128, 1) qk_norm_backward_##TAG##_##NAME(const rfkernels::cuda::QkNorm a) {               \
    rfkernels::cuda::qk_norm_backward<rfkernels::cuda::KIND, DIM, LANES, 128>(a);                                \
  }

#define GELU(KIND, TAG, EXACT, NAME)                                                                            \
  KERNEL __launch_bounds__(128, 1) gelu_backward_##TAG##_##NAME(const rfkernels::cuda::GeluBackward a) {            \
    rfkernels::cuda::gelu_backward<rfkernels::cuda::KIND, EXACT, 128>(a);                                        \
  }

#define ALL(KIND, TAG)                                                                                          \
  ADALN(KIND, TAG, 960, 128, 960)                                                                                \
  ADALN(KIND, TAG, 1152, 160, 1152)                                                                              \
  ADALN(KIND, TAG, 1536, 192, 1536)                                                                              \
  ADALN(KIND, TAG, 1920, 256, 1920)                                                                              \
  ADALN(KIND, TAG, 2432, 320, 2432)                                                                              \
  ADALN(KIND, TAG, 3072, 384, 3072)                                                                              \
  ADALN(KIND, TAG, 0, 256, any)                                                                                  \
  ADALN(KIND, TAG, 0, 512, any_wide)                                                                             \
  QK_NORM(KIND, TAG, 64, 8, 64)                                                                                  \
  QK_NORM(KIND, TAG, 128, 16, 128)                                                                               \
  QK_NORM(KIND, TAG, 0, 32, any)                                                                                 \
  GELU(KIND, TAG, true, exact)                                                                                   \
  GELU(KIND, TAG, false, any)

ALL(kBF16, bf16)
ALL(kF16, fp16)
ALL(kF32, fp32)
