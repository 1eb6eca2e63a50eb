// Patches of latents, by a copy where no graph of gradients is wanted, else by views of PyTorch's.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "../ops/autograd.h"

namespace rfkernels::on_cpu {

// Whether gradients have a graph, or are wrapped in something that kernels do not read.
inline bool with_graph(const variable_list& grads) {
  for (const Tensor& grad : grads)
    if (grad.defined() && !plain(grad)) return true;
  return at::GradMode::is_enabled();
}

// Between a latent [B, C, H, W] and its patches [B * h * w, C * p * p]: an element of a patch is (channel, row, column)
// or (row, column, channel).
template <typename T>
void move(T* latent, T* patches, at::IntArrayRef shape, int64_t p, bool channel_first, bool gather) {
  const int64_t channels = shape[1], height = shape[2], width = shape[3], h = height / p, w = width / p;
  const int64_t size = channels * p * p, of_c = channel_first ? p * p : 1, of_r = channel_first ? p : p * channels;
  const int64_t of_s = channel_first ? 1 : channels;
  at::parallel_for(0, shape[0] * h, std::max<int64_t>(1, 16384 / (w * size)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)                                  // of patches
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t r = 0; r < p; ++r) {
          T* line = latent + ((row / h * channels + c) * height + row % h * p + r) * width;
          T* to = patches + row * w * size + c * of_c + r * of_r;
          for (int64_t j = 0; j < w; ++j)
            for (int64_t s = 0; s < p; ++s)
              if (gather)
                to[j * size + s * of_s] = line[j * p + s];
              else
                line[j * p + s] = to[j * size + s * of_s];
        }
  });
}

inline void move(const Tensor& latent, const Tensor& patches, int64_t p, bool channel_first, bool gather) {
  if (latent.element_size() == 4)
    move(static_cast<float*>(latent.data_ptr()), static_cast<float*>(patches.data_ptr()), latent.sizes(), p,
         channel_first, gather);
  else
    move(static_cast<uint16_t*>(latent.data_ptr()), static_cast<uint16_t*>(patches.data_ptr()), latent.sizes(), p,
         channel_first, gather);
}

inline Tensor patches_of(const Tensor& latent, int64_t p, bool channel_first) {
  const int64_t b = latent.size(0), c = latent.size(1), h = latent.size(2) / p, w = latent.size(3) / p;
  if (with_graph({latent})) {
    const Tensor cells = latent.reshape({b, c, h, p, w, p});
    const Tensor ordered = channel_first ? cells.permute({0, 2, 4, 1, 3, 5}) : cells.permute({0, 2, 4, 3, 5, 1});
    return ordered.reshape({b * h * w, c * p * p});
  }
  Tensor patches = at::empty({b * h * w, c * p * p}, latent.options());
  move(latent.contiguous(), patches, p, channel_first, true);
  return patches;
}

inline Tensor latent_of(const Tensor& patches, at::IntArrayRef shape, int64_t p, bool channel_first) {
  const int64_t b = shape[0], c = shape[1], h = shape[2] / p, w = shape[3] / p;
  if (with_graph({patches})) {
    const Tensor cells = channel_first ? patches.reshape({b, h, w, c, p, p}).permute({0, 3, 1, 4, 2, 5})
                                       : patches.reshape({b, h, w, p, p, c}).permute({0, 5, 1, 3, 2, 4});
    return cells.reshape(shape);
  }
  Tensor latent = at::empty(shape, patches.options());
  move(latent, patches.contiguous(), p, channel_first, false);
  return latent;
}

}  // namespace rfkernels::on_cpu
