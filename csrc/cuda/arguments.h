// What the kernels of this folder are given, by value; for their code and for who launches them.
#pragma once

#include <cstdint>

namespace rfkernels::cuda {

constexpr int kVector = 8;                   // channels of a thread at a time: 16 bytes of 16-bit numbers

enum Kind : int { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum Way : int { kNone = 0, kSummed = 1, kStored = 2 };  // what becomes of a vector's gradient

struct Rows {
  const void* data;
  int64_t batch, token;                      // strides; of a vector either may be zero
};

struct Vector {
  Rows rows;                                 // data null: not given
  Kind kind;
  Way way;
  void* gradient;                            // kSummed: partials [B * splits, C] fp32; kStored: [B, S, C] of its dtype
};

struct AdalnBackward {
  Rows dy, dh, x, branch;
  Vector shift, scale, gate;                 // shift's own values are not read
  const float *mean, *rstd;                  // [B, S]
  void *dx, *dbranch;                        // [B, S, C]
  float* bias;                               // partials of the sum of dbranch, or null
  int32_t length, span, channels;
  float one;
  bool rms;
};

// x [B, S, H, D] with strides, its rows numbered (b, s, h).
struct Heads {
  const void* data;
  int64_t batch, token, head;
};

struct QkNorm {
  Heads x, dy;                               // dy: of a backward
  const void* weight;
  void *out, *dx;                            // [B, S, H, D]
  float* partials;                           // [gridDim.x, D]: the weight's gradient, a row for each block
  int64_t rows;
  int32_t length, heads, dim;
  Kind weight_kind;
  float eps;
};

// Queries and keys, by blockIdx.y.
struct QkNormPair {
  QkNorm of[2];
};

struct GeluBackward {
  const void *h, *da;                        // [rows, C]
  void *a, *dh;                              // a null: not asked for
  float* partials;                           // [splits, C], or null
  int64_t rows, span;
  int32_t channels;
};

// Names of the dtypes in kernels.cu.
constexpr const char* kNames[] = {"fp32", "bf16", "fp16"};

// Threads of a block of the adaLN family, for a width that has a kernel of its own; 0: none.
constexpr int threads_of(int64_t channels) {
  switch (channels) {
    case 960: return 128;
    case 1152: return 160;
    case 1536: return 192;
    case 1920: return 256;
    case 2432: return 320;
    case 3072: return 384;
    default: return 0;
  }
}

// For any other width; 0: too wide.
constexpr int kThreads = 256, kManyThreads = 512;
constexpr int threads_of_any(int64_t channels) {
  return channels <= kVector * kThreads ? kThreads : channels <= kVector * kManyThreads ? kManyThreads : 0;
}

// Of qk_norm and GELU. Threads that share a row of qk_norm, for a head dimension with a kernel of its own; 0: none.
constexpr int kRowThreads = 128, kAnyLanes = 32, kWidestHead = kVector * kAnyLanes;
constexpr int lanes_of(int64_t dim) { return dim == 64 ? 8 : dim == 128 ? 16 : 0; }
constexpr int64_t rows_of_block(int64_t dim) { return kRowThreads / (lanes_of(dim) ? lanes_of(dim) : kAnyLanes); }

}  // namespace rfkernels::cuda
