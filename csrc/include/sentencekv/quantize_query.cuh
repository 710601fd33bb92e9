// SPDX-License-Identifier: Apache-2.0
// Queries rotated and rounded to six bits, a warp each, where the rotation is a Hadamard matrix
// with signed rows. Defined by sentencekv_vllm/ops/quantize_query.py; the additions come in the
// order of csrc/cpu/rotate.hpp and triton_kernels/quantize_query.py, so levels are the same.
#pragma once

#include "warp.cuh"

namespace sentencekv {

constexpr int kPlanes = 6;  // bits of a level
constexpr int kQueryLevels = 31;

enum QueryType : int32_t { kBfloat16, kFloat16, kFloat32 };

/// A lane's share of a query of 32 * kPer channels.
///
/// The lanes' bits of entry j, taken together, are word j % 4 of product j / 4 in
/// score_tokens.cuh: bit 8 i + b is channel b of byte row j % 4 + 4 i.
template <int kPer>
struct LaneQuery {
  static constexpr int kWords = kPer < 4 ? kPer : 4;
  float x[kPer];

  __device__ static int channel(int lane, int j) {
    return 128 * (j / 4) + 8 * (j % 4) + 8 * kWords * (lane / 8) + lane % 8;
  }

  __device__ void read(const void* queries, int type, int64_t row, const float* rotation, int lane) {
    constexpr int kDim = kWarp * kPer;
    const int64_t base = row * kDim;
    float signs[kPer];  // times 1 / sqrt(D): the first column has no others
#pragma unroll
    for (int j = 0; j < kPer; ++j) signs[j] = rotation[channel(lane, j) * kDim];
    if (type == kFloat32) {
      const float* query = static_cast<const float*>(queries) + base;
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] = query[channel(lane, j)];
    } else {
      const uint16_t* query = static_cast<const uint16_t*>(queries) + base;
      uint16_t halves[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) halves[j] = query[channel(lane, j)];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint16_t half = halves[j];
        x[j] = type == kBfloat16 ? float_of(static_cast<uint32_t>(half) << 16) : half_to_float(half);
      }
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) x[j] = __fmul_rn(x[j], signs[j]);  // no part of a fused addition
  }

  /// Sums and differences of channels that differ in one bit, from the lowest bit up.
  __device__ void rotate(int lane) {
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) across(lane, bit);
#pragma unroll
    for (int bit = 1; bit < kWords; bit *= 2) within(bit);
    across(lane, 8);
    across(lane, 16);
    if (kPer == 8) within(4);
  }

  /// Write the levels and return the step.
  __device__ float quantize(int (&levels)[kPer]) const {
    float top = 0.0f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) top = fmaxf(top, fabsf(x[j]));
    const float step = max_over(top, kWarp - 1) / kQueryLevels;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) levels[j] = static_cast<int>(rintf(x[j] * inverse));
    return step;
  }

 private:
  __device__ void across(int lane, int bit) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float other = __shfl_xor_sync(kAllLanes, x[j], bit);
      x[j] = lane & bit ? other - x[j] : x[j] + other;
    }
  }

  __device__ void within(int bit) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (j & bit) continue;
      const float low = x[j], high = x[j | bit];
      x[j] = low + high;
      x[j | bit] = low - high;
    }
  }
};

}  // namespace sentencekv
