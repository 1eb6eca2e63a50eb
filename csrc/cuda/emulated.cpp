// The kernels on a CPU, for tests: each runs on a grid with its threads in a given order. Returns the races found.
#include "kernels.cu"

namespace {
std::string report;

template <typename Arguments>
const char* run(void (*kernel)(Arguments), const Arguments& a, int grid_x, int grid_y, int threads, int order) {
  emulation::races.clear();
  emulation::run({static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1}, static_cast<unsigned>(threads), order,
                 [&] { kernel(a); });
  report.clear();
  for (const auto& race : emulation::races) report += race + "\n";
  return report.c_str();
}
}  // namespace

#define RUN_ADALN(TAG, NAME, THREADS)                                                                              \
  extern "C" const char* run_adaln_backward_##TAG##_##NAME(const AdalnBackward* a, int x, int y, int order) {      \
    return run<AdalnBackward>(adaln_backward_##TAG##_##NAME, *a, x, y, THREADS, order);                            \
  }                                                                                                                \
  extern "C" const char* run_gated_adaln_backward_##TAG##_##NAME(const AdalnBackward* a, int x, int y, int order) {\
    return run<AdalnBackward>(gated_adaln_backward_##TAG##_##NAME, *a, x, y, THREADS, order);                      \
  }
#define RUN_QK(TAG, NAME)                                                                                          \
  extern "C" const char* run_qk_norm_forward_##TAG##_##NAME(const QkNormPair* a, int x, int y, int order) {        \
    return run<QkNormPair>(qk_norm_forward_##TAG##_##NAME, *a, x, y, kRowThreads, order);                          \
  }                                                                                                                \
  extern "C" const char* run_qk_norm_backward_##TAG##_##NAME(const QkNormPair* a, int x, int y, int order) {       \
    return run<QkNormPair>(qk_norm_backward_##TAG##_##NAME, *a, x, y, kRowThreads, order);                         \
  }
#define RUN_GELU(TAG, NAME)                                                                                        \
  extern "C" const char* run_gelu_backward_##TAG##_##NAME(const GeluBackward* a, int x, int y, int order) {        \
    return run<GeluBackward>(gelu_backward_##TAG##_##NAME, *a, x, y, kRowThreads, order);                          \
  }
#define RUN_ALL(TAG)                                                                                               \
  RUN_ADALN(TAG, 960, 128) RUN_ADALN(TAG, 1152, 160) RUN_ADALN(TAG, 1536, 192) RUN_ADALN(TAG, 1920, 256)           \
  RUN_ADALN(TAG, 2432, 320) RUN_ADALN(TAG, 3072, 384) RUN_ADALN(TAG, any, kThreads)                                \
  RUN_ADALN(TAG, any_wide, kManyThreads)                                                                           \
  RUN_QK(TAG, 64) RUN_QK(TAG, 128) RUN_QK(TAG, any) RUN_GELU(TAG, exact) RUN_GELU(TAG, any)

RUN_ALL(bf16)
RUN_ALL(fp16)
RUN_ALL(fp32)
