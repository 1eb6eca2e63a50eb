// What the kernels of this folder need of a device: types, 16-byte accesses, shuffles, shared memory. The same source is
// compiled by nvcc for a GPU and by a C++ compiler for emulation.h, which runs a block's threads one after another and
// looks for races.
#pragma once

#include "arguments.h"

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#else
#include "emulation.h"
#define DEVICE inline
#define KERNEL inline void
#define __launch_bounds__(...)
#define __grid_constant__
#endif

namespace rfkernels::cuda {

template <int KIND>
struct Element {
  static constexpr int kBytes = KIND == kF32 ? 4 : 2;
};

DEVICE float from_bf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
#if defined(__CUDACC__)
  return __uint_as_float(wide);
#else
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
#endif
}

// Two numbers in 32 bits, the first in the lower half, to nearest even.
template <int KIND>
DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  uint32_t both;
  if (KIND == kBF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return emulation::round16(low, KIND == kBF16) | emulation::round16(high, KIND == kBF16) << 16;
#endif
}

template <int KIND>
DEVICE float unpack(uint32_t both, bool high) {
  const uint32_t bits = high ? both >> 16 : both & 0xffffu;
  if (KIND == kBF16) return from_bf16(bits);
#if defined(__CUDACC__)
  float value;
  asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#else
  return emulation::from_f16(static_cast<uint16_t>(bits));
#endif
}

struct alignas(16) Words {
  uint32_t w[4];
};

DEVICE Words load16(const void* from) {
#if defined(__CUDACC__)
  const uint4 got = *static_cast<const uint4*>(from);  // as uint4: a struct is copied in pieces of 4 bytes
  return {{got.x, got.y, got.z, got.w}};
#else
  Words got;
  __builtin_memcpy(&got, from, 16);
  return got;
#endif
}

DEVICE void store16(void* to, const Words& value) {
#if defined(__CUDACC__)
  *static_cast<uint4*>(to) = make_uint4(value.w[0], value.w[1], value.w[2], value.w[3]);
#else
  __builtin_memcpy(to, &value, 16);
#endif
}

// One element.
template <int KIND>
DEVICE float load1(const void* from, int64_t i) {
  if (KIND == kF32) return static_cast<const float*>(from)[i];
  return unpack<KIND>(static_cast<const uint16_t*>(from)[i], false);
}

template <int KIND>
DEVICE void store1(void* to, int64_t i, float value) {
  if (KIND == kF32)
    static_cast<float*>(to)[i] = value;
  else
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pack<KIND>(value, 0.f) & 0xffffu);
}

// Eight elements from element i on, which is a multiple of 8; those beyond `count` are zeros. EXACT: there are eight, and
// their address is a multiple of 16.
template <int KIND, bool EXACT>
DEVICE void load8(const void* from, int64_t i, int count, float (&out)[kVector]) {
  if (!EXACT) {
    for (int k = 0; k < kVector; ++k) out[k] = k < count ? load1<KIND>(from, i + k) : 0.f;
    return;
  }
  const char* at = static_cast<const char*>(from) + i * Element<KIND>::kBytes;
  if (KIND == kF32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words got = load16(at + 16 * half);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#if defined(__CUDACC__)
        out[4 * half + k] = __uint_as_float(got.w[k]);
#else
        __builtin_memcpy(&out[4 * half + k], &got.w[k], 4);
#endif
      }
    }
  } else {
    const Words got = load16(at);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = unpack<KIND>(got.w[k], false);
      out[2 * k + 1] = unpack<KIND>(got.w[k], true);
    }
  }
}

template <int KIND, bool EXACT>
DEVICE void store8(void* to, int64_t i, int count, const float (&value)[kVector]) {
  if (!EXACT) {
    for (int k = 0; k < kVector; ++k)
      if (k < count) store1<KIND>(to, i + k, value[k]);
    return;
  }
  char* at = static_cast<char*>(to) + i * Element<KIND>::kBytes;
  if (KIND == kF32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Words made;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#if defined(__CUDACC__)
        made.w[k] = __float_as_uint(value[4 * half + k]);
#else
        __builtin_memcpy(&made.w[k], &value[4 * half + k], 4);
#endif
      }
      store16(at + 16 * half, made);
    }
  } else {
    Words made;
#pragma unroll
    for (int k = 0; k < 4; ++k) made.w[k] = pack<KIND>(value[2 * k], value[2 * k + 1]);
    store16(at, made);
  }
}

// The same of a dtype that is known when the kernel runs: a modulation vector's.
template <bool EXACT>
DEVICE void load8(Kind kind, const void* from, int64_t i, int count, float (&out)[kVector]) {
  if (kind == kF32)
    load8<kF32, EXACT>(from, i, count, out);
  else if (kind == kBF16)
    load8<kBF16, EXACT>(from, i, count, out);
  else
    load8<kF16, EXACT>(from, i, count, out);
}

template <bool EXACT>
DEVICE void store8(Kind kind, void* to, int64_t i, int count, const float (&value)[kVector]) {
  if (kind == kF32)
    store8<kF32, EXACT>(to, i, count, value);
  else if (kind == kBF16)
    store8<kBF16, EXACT>(to, i, count, value);
  else
    store8<kF16, EXACT>(to, i, count, value);
}

#if defined(__CUDACC__)
DEVICE float from_lane_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE void barrier() { __syncthreads(); }
DEVICE float sqrt_of(float x) { return sqrtf(x); }
DEVICE float exp2_of(float x) { return exp2f(x); }

template <typename T, int N>
struct Shared {
  T* data;
  DEVICE T& operator[](int i) const { return data[i]; }
};
#define SHARED(type, name, count)  \
  __shared__ type name##_room[count]; \
  const Shared<type, count> name{name##_room}
#else
inline float from_lane_xor(float value, int mask) { return emulation::from_lane_xor(value, mask); }
inline void barrier() { emulation::barrier(); }
inline float sqrt_of(float x) { return __builtin_sqrtf(x); }
inline float exp2_of(float x) { return __builtin_exp2f(x); }
#define SHARED(type, name, count) const emulation::Shared<type> name(#name, count)
#endif

// Sums of two values over the block, in an order that does not depend on anything. `room` holds 2 * WARPS numbers for each
// of two uses that follow one another: a thread may read the first while another already writes the second.
template <int WARPS, typename Room>
DEVICE void block_sums(float& a, float& b, const Room& room, int use) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    a += from_lane_xor(a, mask);
    b += from_lane_xor(b, mask);
  }
  if (WARPS == 1) return;
  const int base = (use & 1) * 2 * WARPS, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
    room[base + 2 * warp] = a;
    room[base + 2 * warp + 1] = b;
  }
  barrier();
  a = b = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    a += room[base + 2 * i];
    b += room[base + 2 * i + 1];
  }
}

}  // namespace rfkernels::cuda
