// SPDX-License-Identifier: Apache-2.0
// The integers of sentencekv_vllm/ops/score_blocks.py: logits in units of 1/16 of an octave, and
// powers of two of them. Each float is one product and is rounded down, so nothing depends on an
// order or on contraction.
#pragma once

#include "warp.cuh"

namespace sentencekv {

constexpr uint32_t kUnits = 16;       // an octave; unsigned, so that it divides by a shift
constexpr float kUnitLimit = 1 << 20;  // of either part of an estimate
constexpr int kOne = 1 << 22;          // the largest token of a block, in its sum
constexpr int kMaxDim = 256;           // channels of a head

/// Floats in [2^23, 2^24) are whole: with this added, an integer is the low bits of its float, and
/// an addition that rounds down is a floor. Conversions take several times as long.
constexpr float kWhole = 12582912.0f;
constexpr int32_t kWholeBits = 0x4b400000;

/// The float of an integer of at most 22 bits that kWholeBits was added to.
__device__ inline float unbiased(int32_t biased) {
  return float_of(static_cast<uint32_t>(biased)) - kWhole;
}

/// floor(x) within +-kUnitLimit, plus kWholeBits; the least if x is no number.
__device__ inline int32_t floor_units(float x) {
  const float within = fminf(fmaxf(x, -kUnitLimit), kUnitLimit);
  return static_cast<int32_t>(bits_of(__fadd_rd(within, kWhole)));
}

/// kOne * 2^(-part / kUnits) for part of 0 to 15.
__device__ inline int32_t exp2_part(uint32_t part) {
  const int32_t x = static_cast<int32_t>(part);
  return kOne + x * (2847 * x - 176300);
}

/// kOne * 2^(-below / kUnits).
__device__ inline int32_t exp2_units(uint32_t below) {
  return exp2_part(below % kUnits) >> min(below / kUnits, 31u);
}

}  // namespace sentencekv
