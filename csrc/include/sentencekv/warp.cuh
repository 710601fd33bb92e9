// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together.
#pragma once

#include <cstdint>

#include "launch.hpp"

namespace sentencekv {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } word{bits};
  return word.value;
}

__device__ inline uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t bits;
  } word{value};
  return word.bits;
}

__device__ inline float half_to_float(uint16_t half) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponents of halves are 112 less; a product also restores subnormal ones.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
#endif
}

/// Bring the line of an address to the L2 cache.
__device__ inline void prefetch([[maybe_unused]] const void* address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/// Floats as integers of the same order; triton_kernels/ordered.py.
constexpr int32_t kLowest = INT32_MIN;  // below the code of every float, -inf included

__device__ inline int32_t to_ordered(float value) {
  const int32_t bits = static_cast<int32_t>(bits_of(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ inline float from_ordered(int32_t code) {
  return float_of(static_cast<uint32_t>(code ^ ((code >> 31) & 0x7fffffff)));
}

constexpr uint32_t kMinusInfinity = 0xff800000u;

__device__ inline float minus_infinity() { return float_of(kMinusInfinity); }

/// Lanes that differ in the bits of `lanes` (1, 2, 4, 8, 16, or several) end with the same maximum.
__device__ inline float max_over(float value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2) {
    if (lanes & bit) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

__device__ inline int max_over(int value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2) {
    if (lanes & bit) value = max(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

__device__ inline uint32_t max_over(uint32_t value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2) {
    if (lanes & bit) value = max(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

__device__ inline float sum_over(float value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2) {
    if (lanes & bit) value += __shfl_xor_sync(kAllLanes, value, bit);
  }
  return value;
}

/// A load that is issued here: the assembler moves others behind a branch that does not need them.
__device__ inline int32_t load_early(const int32_t* pointer) {
#ifdef __CUDACC__
  int32_t value;
  asm volatile("ld.volatile.global.b32 %0, [%1];" : "=r"(value) : "l"(pointer));
  return value;
#else
  return *pointer;
#endif
}

/// Bits [begin, end) of a word, none where the range is empty; 0 <= begin, end <= 16.
__device__ inline uint32_t bits_between(int begin, int end) {
  return begin < end ? (1u << end) - (1u << begin) : 0;
}

__device__ inline int warp_sum(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);
#else
  for (int bit = 1; bit < kWarp; bit *= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
#endif
}

__device__ inline int64_t warp_sum(int64_t value) {
  for (int bit = 1; bit < kWarp; bit *= 2) {
    value += __shfl_xor_sync(kAllLanes, static_cast<long long>(value), bit);
  }
  return value;
}

__device__ inline int warp_max(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
  return max_over(value, kWarp - 1);
#endif
}

/// The running sum of exp(x - top) for x seen so far.
struct LogSum {
  float top, total;

  __device__ static LogSum none() { return {minus_infinity(), 0.0f}; }

  __device__ void add(float x) { merge({x, 1.0f}); }

  __device__ void merge(const LogSum& other) {
    const float raised = fmaxf(top, other.top);
    if (raised == minus_infinity()) return;
    total = total * expf(top - raised) + other.total * expf(other.top - raised);
    top = raised;
  }

  /// Lanes that differ in the bits of `lanes` end with the sum over all of them.
  __device__ void merge_over(int lanes) {
    const float raised = max_over(top, lanes);
    total = sum_over(raised == minus_infinity() ? 0.0f : total * expf(top - raised), lanes);
    top = raised;
  }
};

/// One tensor core product of bits: counts of common ones of 16 rows and 8 columns of 128 bits.
///
/// Lane 4 * g + q holds bits 32 q to 32 q + 31 of rows g and g + 8, and of column g; it receives
/// rows g and g + 8 of columns 2 q and 2 q + 1 (PTX ISA, mma.m16n8k128 with .b1).
__device__ inline void add_common_bits(int (&counts)[4], uint32_t row, uint32_t lower_row,
                                       uint32_t column) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(counts[0]), "+r"(counts[1]), "+r"(counts[2]), "+r"(counts[3])
      : "r"(row), "r"(lower_row), "r"(column));
#else
  const int lane = threadIdx.x % kWarp, q = lane % 4;
  using Words = host_cuda::Words;
  host_warp_exchange({row, lower_row, column}, [&](const Words* shown) {
    for (int k = 0; k < 4; ++k) {
      const Words& rows = shown[lane - q + k];
      for (int j = 0; j < 2; ++j) {
        const uint32_t ones = shown[4 * (2 * q + j) + k][2];
        counts[j] += __builtin_popcount(rows[0] & ones);
        counts[2 + j] += __builtin_popcount(rows[1] & ones);
      }
    }
  });
#endif
}

}  // namespace sentencekv
