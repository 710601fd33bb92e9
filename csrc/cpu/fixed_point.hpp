// SPDX-License-Identifier: Apache-2.0
// The integers of ops/score_blocks.py: logits in units of 1/16 of an octave, and powers of two of
// them. No float is added, so nothing depends on an order or on contraction.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.hpp"

namespace sentencekv::cpu {

typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));

constexpr int32_t kUnits = 16;               // an octave
constexpr float kUnitLimit = 1 << 20;        // of either part of an estimate
constexpr int32_t kOne = 1 << 22;            // the largest token of a block, in its sum
constexpr int32_t kNone = -(1 << 30);        // top of a block that is not there
constexpr int32_t kSlope = 176300, kBend = 2847;  // of the parabola within an octave

inline Ints load_ints(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline void store_ints(int32_t* p, Ints v) { *reinterpret_cast<Ints*>(p) = v; }

// floor(clamp(x)), for any x but NaN.
inline Ints floor_units(Floats x) {
  const Floats low = Floats{} - kUnitLimit, high = Floats{} + kUnitLimit;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Ints whole = __builtin_convertvector(x, Ints);
  const Floats back = __builtin_convertvector(whole, Floats);
  return whole + (Ints)(back > x);  // a true comparison is -1
}
inline int32_t floor_units(float x) {
  x = std::clamp(x, -kUnitLimit, kUnitLimit);
  const auto whole = static_cast<int32_t>(x);
  return whole - (static_cast<float>(whole) > x);
}

// kOne * 2^(-below / kUnits) for below >= 0.
inline Ints exp2_units(Ints below) {
  const Ints part = below & (kUnits - 1), octaves = below >> 4;
  const Ints most = Ints{} + 31;
  return (kOne - kSlope * part + kBend * part * part) >> (octaves < most ? octaves : most);
}
inline int32_t exp2_units(int32_t below) {
  const int32_t part = below & (kUnits - 1);
  return (kOne - kSlope * part + kBend * part * part) >> std::min(below >> 4, 31);
}

inline int32_t lane_max(Ints v) {
  int32_t best = v[0];
  for (int k = 1; k < kLanes; ++k) best = std::max(best, v[k]);
  return best;
}
inline int32_t lane_total(Ints v) {
  int32_t sum = v[0];
  for (int k = 1; k < kLanes; ++k) sum += v[k];
  return sum;
}

}  // namespace sentencekv::cpu
