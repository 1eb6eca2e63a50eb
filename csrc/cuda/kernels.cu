// The kernels of this folder by name: what a driver loads. One for each dtype and width; "any" takes every other width.
// BOUNDS: threads, and for any width how many blocks are to fit, since the compiler's own choice spills on sm_100.
#include "adaln.h"
#include "others.h"

using namespace rfkernels::cuda;

#define ADALN(KIND, TAG, CHANNELS, THREADS, NAME, BOUNDS)                                                        \
  KERNEL __launch_bounds__ BOUNDS adaln_backward_##TAG##_##NAME(const AdalnBackward a) {                         \
    adaln_backward<KIND, CHANNELS, THREADS, false>(a);                                                           \
  }                                                                                                              \
  KERNEL __launch_bounds__ BOUNDS gated_adaln_backward_##TAG##_##NAME(const AdalnBackward a) {                   \
    adaln_backward<KIND, CHANNELS, THREADS, true>(a);                                                            \
  }

#define QK_NORM(KIND, TAG, DIM, LANES, NAME)                                                                     \
  KERNEL __launch_bounds__(kRowThreads)                                                                          \
      qk_norm_forward_##TAG##_##NAME(const __grid_constant__ QkNormPair a) {                                     \
    qk_norm_forward<KIND, DIM, LANES, kRowThreads>(a.of[blockIdx.y]);                                            \
  }                                                                                                              \
  KERNEL __launch_bounds__(kRowThreads)                                                                          \
      qk_norm_backward_##TAG##_##NAME(const __grid_constant__ QkNormPair a) {                                    \
    qk_norm_backward<KIND, DIM, LANES, kRowThreads>(a.of[blockIdx.y]);                                           \
  }

#define GELU(KIND, TAG, EXACT, NAME)                                                                             \
  KERNEL __launch_bounds__(kRowThreads) gelu_backward_##TAG##_##NAME(const GeluBackward a) {                     \
    gelu_backward<KIND, EXACT, kRowThreads>(a);                                                                  \
  }

#define ALL(KIND, TAG)                                                                                           \
  ADALN(KIND, TAG, 960, 128, 960, (128))                                                                         \
  ADALN(KIND, TAG, 1152, 160, 1152, (160))                                                                       \
  ADALN(KIND, TAG, 1536, 192, 1536, (192))                                                                       \
  ADALN(KIND, TAG, 1920, 256, 1920, (256))                                                                       \
  ADALN(KIND, TAG, 2432, 320, 2432, (320))                                                                       \
  ADALN(KIND, TAG, 3072, 384, 3072, (384))                                                                       \
  ADALN(KIND, TAG, 0, kThreads, any, (kThreads, 2))                                                              \
  ADALN(KIND, TAG, 0, kManyThreads, any_wide, (kManyThreads, 1))                                                 \
  QK_NORM(KIND, TAG, 64, 8, 64)                                                                                  \
  QK_NORM(KIND, TAG, 128, 16, 128)                                                                               \
  QK_NORM(KIND, TAG, 0, kAnyLanes, any)                                                                          \
  GELU(KIND, TAG, true, exact)                                                                                   \
  GELU(KIND, TAG, false, any)

ALL(kBF16, bf16)
ALL(kF16, fp16)
ALL(kF32, fp32)
