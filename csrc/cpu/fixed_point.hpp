// SPDX-License-Identifier: Apache-2.0
// The integers of ops/score_blocks.py: logits in units of 1/16 of an octave, and powers of two of
// them. No float is added, so nothing depends on an order or on contraction. Scalar functions,
// written for loops that the compiler vectorises.
#pragma once

#include <cmath>
#include <cstdint>

namespace sentencekv::cpu {

constexpr int32_t kUnits = 16;               // an octave
constexpr float kUnitLimit = 1 << 20;        // of either part of an estimate
constexpr int32_t kOne = 1 << 22;            // the largest token of a block, in its sum
constexpr int32_t kNone = -(1 << 30);        // top of a block that is not there
constexpr int32_t kSlope = 176300, kBend = 2847;  // of the parabola within an octave

// floor(clamp(x)), for any x but NaN.
inline int32_t floor_units(float x) {
  x = x > -kUnitLimit ? x : -kUnitLimit;
  x = x < kUnitLimit ? x : kUnitLimit;
  return static_cast<int32_t>(std::floor(x));
}

// kOne * 2^(-below / kUnits) for below >= 0.
inline int32_t exp2_units(int32_t below) {
  const int32_t part = below & (kUnits - 1), octaves = below >> 4;
  return (kOne - kSlope * part + kBend * part * part) >> (octaves < 31 ? octaves : 31);
}

}  // namespace sentencekv::cpu
