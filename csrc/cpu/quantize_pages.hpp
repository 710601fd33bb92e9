// SPDX-License-Identifier: Apache-2.0
// ops/quantize_pages.py: head-blocks at lower precision for the swap pool, and back.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "args.hpp"
#include "element.hpp"
#include "simd.hpp"

namespace sentencekv::cpu {

constexpr int64_t kRun = 32;  // elements whose int4 codes share 16 bytes
constexpr int64_t kHalfRun = kRun / 2;
constexpr int64_t kMaxGroupSize = 64;
constexpr int64_t kAheadBytes = 512;  // prefetched: missed pages and their slots are cold
constexpr float kSmallest = 0x1p-100f;

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));


// kLanes elements, rounded to nearest, ties to even.
inline void store_elements(Bfloat16* out, Floats values) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Words bits = (Words)values;
  const Words high = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#if defined(__AVX512F__)
  const auto rounded = (Halves)_mm512_cvtepi32_epi16((__m512i)high);
#else
  const auto rounded = __builtin_convertvector(high, Halves);
#endif
  std::memcpy(out, &rounded, sizeof(rounded));
}
inline void store_elements(_Float16* out, Floats values) {
  typedef _Float16 Halves __attribute__((vector_size(32)));
  const auto rounded = __builtin_convertvector(values, Halves);
  std::memcpy(out, &rounded, sizeof(rounded));
}
inline void store_elements(float* out, Floats values) { store_floats(out, values); }

// kLanes codes.
inline Ints load_codes(const uint8_t* p) {
  typedef uint8_t Codes __attribute__((vector_size(16)));
  Codes codes;
  std::memcpy(&codes, p, sizeof(codes));
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32((__m128i)codes);  // what gcc 12 does not find by itself
#else
  typedef uint16_t Halves __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(codes, Halves), Ints);
#endif
}
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// Round to nearest, ties to even, of |x| <= 448; below 2^-6 the codes count multiples of 2^-9.
inline uint8_t to_fp8(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  const auto small = static_cast<uint32_t>(static_cast<int32_t>(
      std::nearbyint(std::min(as_float(magnitude), 1.0f) * 512)));
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (magnitude < 0x3c800000u ? small : normal));
}

inline Floats from_fp8(Ints code) {
  const Ints magnitude = code & 0x7f;
  const Floats small = to_floats(magnitude) * (1.0f / 512);
  const Floats normal = (Floats)((magnitude + (120 << 3)) << 20);
  const Ints value = magnitude < 8 ? (Ints)small : (Ints)normal;
  return (Floats)(value | (code & 0x80) << 24);
}

// The parts of a stored head-block, aligned as their types ask for where head-blocks are.
template <class Element>
struct HostParts {
  uint8_t* codes;
  uint16_t* steps;  // bfloat16
  Element* lows;    // integers only

  HostParts(const Pools& pools, uint8_t* head_block) : codes(head_block) {
    const int64_t numel = pools.head_block_numel();
    const int64_t bytes = pools.host_dtype == HostDtype::kInt4 ? numel / 2 : numel;
    steps = reinterpret_cast<uint16_t*>(head_block + bytes);
    lows = reinterpret_cast<Element*>(steps + numel / pools.group_size);
  }
};

struct Extremes {
  float low, high;
};

// Of `size` floats, a multiple of kLanes.
inline Extremes extremes(const float* x, int64_t size) {
  Floats low = load_floats(x), high = low;
  for (int64_t i = kLanes; i < size; i += kLanes) {
    const Floats v = load_floats(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  Extremes all{low[0], high[0]};
  for (int64_t k = 1; k < kLanes; ++k) {
    all.low = low[k] < all.low ? low[k] : all.low;
    all.high = high[k] > all.high ? high[k] : all.high;
  }
  return all;
}

// `codes` of a group of `size` elements; returns its step.
inline uint16_t quantize_fp8(const float* x, int64_t size, uint8_t* codes) {
  const Extremes found = extremes(x, size);
  const float largest = std::max(std::fabs(found.low), std::fabs(found.high));
  const float binade = as_float(std::bit_cast<uint32_t>(largest) & 0x7f800000u);
  const Bfloat16 step{to_bfloat16(largest > kSmallest ? binade * 0x1p-7f : 0.0f)};
  const float inverse = step > 0 ? 1 / step : 0.0f;
  for (int64_t i = 0; i < size; ++i) codes[i] = to_fp8(x[i] * inverse);
  return step.bits;
}

// The same, with integer codes from 0 to `levels` that count up from `low`.
inline uint16_t quantize_integers(const float* x, int64_t size, int levels, uint8_t* codes,
                                  float& low) {
  const Extremes found = extremes(x, size);
  low = found.low + 0.0f;  // no negative zero
  const float span = found.high - low > kSmallest ? found.high - low : 0.0f;
  const uint32_t exact = std::bit_cast<uint32_t>(span / static_cast<float>(levels));
  const Bfloat16 step{static_cast<uint16_t>((exact + 0xffff) >> 16)};  // rounded up
  const float inverse = step > 0 ? 1 / step : 0.0f;
  for (int64_t i = 0; i < size; ++i)
    codes[i] = static_cast<uint8_t>(
        std::min(levels, static_cast<int>(std::nearbyint((x[i] - low) * inverse))));
  return step.bits;
}

template <class Element>
void quantize(const Pools& pools, const Element* x, uint8_t* head_block) {
  const HostParts<Element> parts(pools, head_block);
  const int64_t size = pools.group_size, groups = pools.head_block_numel() / size;
  const bool halves = pools.host_dtype == HostDtype::kInt4;
  float values[kMaxGroupSize], low;
  uint8_t codes[kMaxGroupSize];
  for (int64_t g = 0; g < groups; ++g, x += size) {
    for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>(x[i]);
    uint16_t step;
    if (pools.host_dtype == HostDtype::kFp8) {
      step = quantize_fp8(values, size, codes);
    } else {
      step = quantize_integers(values, size, halves ? 15 : 255, codes, low);
      store_element(parts.lows + g, low);
    }
    parts.steps[g] = step;
    if (!halves) {
      std::memcpy(parts.codes + g * size, codes, static_cast<std::size_t>(size));
      continue;
    }
    uint8_t* packed = parts.codes + g * size / 2;
    for (int64_t run = 0; run < size; run += kRun, packed += kHalfRun)
      for (int64_t i = 0; i < kHalfRun; ++i)
        packed[i] = static_cast<uint8_t>(codes[run + i] | codes[run + kHalfRun + i] << 4);
  }
}

template <HostDtype dtype, class Element>
void dequantize(const Pools& pools, uint8_t* head_block, Element* out) {
  const HostParts<Element> parts(pools, head_block);
  const int64_t size = pools.group_size, groups = pools.head_block_numel() / size;
  const uint8_t* codes = parts.codes;
  for (int64_t g = 0; g < groups; ++g) {
    const float step = Bfloat16{parts.steps[g]};
    const float low = dtype == HostDtype::kFp8 ? 0.0f : static_cast<float>(parts.lows[g]);
    __builtin_prefetch(codes + kAheadBytes);
    for (int64_t i = 0; i < size; i += kRun, out += kRun) {
      auto* ahead = reinterpret_cast<const char*>(out) + kAheadBytes;
      for (std::size_t byte = 0; byte < kRun * sizeof(Element); byte += 64)
        __builtin_prefetch(ahead + byte, 1);
      if constexpr (dtype == HostDtype::kInt4) {
        const Ints pairs = load_codes(codes);
        store_elements(out, low + to_floats(pairs & 15) * step);
        store_elements(out + kHalfRun, low + to_floats(pairs >> 4) * step);
        codes += kHalfRun;
        continue;
      }
      for (int64_t half = 0; half < kRun; half += kHalfRun, codes += kHalfRun) {
        const Ints code = load_codes(codes);
        if constexpr (dtype == HostDtype::kFp8)
          store_elements(out + half, from_fp8(code) * step);
        else
          store_elements(out + half, low + to_floats(code) * step);
      }
    }
  }
}

// Block `block` of the cache becomes page `page`.
inline void store_page(const Pools& pools, int64_t block, int64_t page, int64_t head) {
  uint8_t* source = pools.cache_head(block, head);
  uint8_t* target = pools.host_head(page, head);
  if (pools.host_dtype == HostDtype::kCopy) {
    std::memcpy(target, source, static_cast<std::size_t>(pools.head_block_bytes()));
    return;
  }
  with_elements(pools.dtype, source,
                [&](auto* elements) { quantize(pools, elements, target); });
}

// Page `page` fills block `block` of the cache.
inline void load_page(const Pools& pools, int64_t page, int64_t block, int64_t head) {
  uint8_t* source = pools.host_head(page, head);
  uint8_t* target = pools.cache_head(block, head);
  if (pools.host_dtype == HostDtype::kCopy) {
    std::memcpy(target, source, static_cast<std::size_t>(pools.head_block_bytes()));
    return;
  }
  with_elements(pools.dtype, target, [&](auto* out) {
    switch (pools.host_dtype) {
      case HostDtype::kInt8: return dequantize<HostDtype::kInt8>(pools, source, out);
      case HostDtype::kInt4: return dequantize<HostDtype::kInt4>(pools, source, out);
      default: return dequantize<HostDtype::kFp8>(pools, source, out);
    }
  });
}

}  // namespace sentencekv::cpu
