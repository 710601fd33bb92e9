// SPDX-License-Identifier: Apache-2.0
// The element types of caches and queries, as float.
#pragma once

#include <bit>
#include <cstdint>

#include "args.hpp"

namespace sentencekv::cpu {

struct Bfloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// Round to nearest, ties to even; a NaN stays a NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_element(Bfloat16* out, float value) { out->bits = to_bfloat16(value); }
inline void store_element(_Float16* out, float value) { *out = static_cast<_Float16>(value); }
inline void store_element(float* out, float value) { *out = value; }

// Calls body(Element*) with the type that `dtype` names.
template <class Body>
void with_elements(Dtype dtype, const void* data, Body body) {
  switch (dtype) {
    case Dtype::kBfloat16: return body(static_cast<const Bfloat16*>(data));
    case Dtype::kFloat16: return body(static_cast<const _Float16*>(data));
    case Dtype::kFloat32: return body(static_cast<const float*>(data));
  }
}
template <class Body>
void with_elements(Dtype dtype, void* data, Body body) {
  switch (dtype) {
    case Dtype::kBfloat16: return body(static_cast<Bfloat16*>(data));
    case Dtype::kFloat16: return body(static_cast<_Float16*>(data));
    case Dtype::kFloat32: return body(static_cast<float*>(data));
  }
}

}  // namespace sentencekv::cpu
