// AdamW on a CPU, spread over threads.
#include <ATen/Parallel.h>

#include "cpu.h"
#include "functions.h"

namespace rfkernels::on_cpu {
namespace {

constexpr int64_t kWorth = 64;  // blocks of kScaled elements that are worth a thread

}  // namespace

void adamw(const AdamW& how, int64_t first_row, Tensor& weight, const Tensor& gradient, Tensor& first, Tensor& second,
           const Maybe& first_scale, const Maybe& second_scale) {
  const int64_t columns = weight.size(1), per_row = (columns + kScaled - 1) / kScaled;
  const States states = first_scale ? EIGHT : first.scalar_type() == at::kBFloat16 ? HALF : FULL;
  const Dtype of_weight = dtype_of(weight), of_gradient = dtype_of(gradient);
  at::parallel_for(0, weight.size(0) * per_row, kWorth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / per_row, column = i % per_row * kScaled, at = row * columns + column;
      cpu_kernels().adamw(how, static_cast<uint32_t>(row + first_row), column, std::min(kScaled, columns - column),
                          bytes(weight, at), of_weight, bytes(gradient, at), of_gradient, bytes(first, at),
                          bytes(second, at), first_scale ? first_scale->data_ptr<float>() + i : nullptr,
                          second_scale ? second_scale->data_ptr<float>() + i : nullptr, states);
    }
  });
}

}  // namespace rfkernels::on_cpu
