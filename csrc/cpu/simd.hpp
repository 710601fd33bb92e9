// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes with a 16-entry table look-up, one type per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sentencekv::cpu {

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// 16 floats, for the compiler to map on what the CPU has.
typedef float Floats __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16;

inline Floats load_floats(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store_floats(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }

inline Floats load_bfloat16s(const uint16_t* p) {
  typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
inline float lane_sum(Floats v) {
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Largest of n floats, NaNs aside; -inf if there is none. Up to 15 floats more are read.
inline float max_of(const float* p, int64_t n) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats lowest = Floats{} - std::numeric_limits<float>::infinity();
  Floats best = lowest;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats x = load_floats(p + i);
    best = x > best ? x : best;
  }
  if (i < n) {
    const Floats x = lane < static_cast<int32_t>(n - i) ? load_floats(p + i) : lowest;
    best = x > best ? x : best;
  }
  const auto a = __builtin_shufflevector(best, best, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto b = __builtin_shufflevector(best, best, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto eight = a > b ? a : b;
  const auto c = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
  const auto d = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const auto four = c > d ? c : d;
  const float e = four[0] > four[2] ? four[0] : four[2];
  const float f = four[1] > four[3] ? four[1] : four[3];
  return e > f ? e : f;
}

// <a, b> of n bytes, exactly.
inline int32_t byte_product(const int8_t* a, const int8_t* b, int64_t n) {
  int32_t sum = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  // The compiler multiplies in 16 bits and widens each product: three times as long.
  auto widened = [&](const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
  };
  __m256i sums = _mm256_setzero_si256();
  for (; i + 16 <= n; i += 16)
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(widened(a), widened(b)));
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  sum = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#endif
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

struct Portable {
  static constexpr int64_t kBytes = 16;
  static constexpr int kStripes = 1;  // that are scanned together, as registers allow
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Words __attribute__((vector_size(16)));

  static Bytes zero() { return Bytes{}; }
  static Bytes load(const uint8_t* p, int64_t bytes = kBytes) {
    Bytes v{};
    std::memcpy(&v, p, static_cast<std::size_t>(bytes));
    return v;
  }
  static Bytes low_nibbles(Bytes v) { return v & 15; }
  static Bytes high_nibbles(Bytes v) { return v >> 4; }
  static Bytes lookup(Bytes table, Bytes index) { return __builtin_shuffle(table, index); }
  static Bytes add_bytes(Bytes a, Bytes b) { return a + b; }
  static Bytes add_words(Bytes a, Bytes b) { return (Bytes)((Words)a + (Words)b); }
  static Bytes odd_bytes(Bytes v) { return (Bytes)((Words)v >> 8); }

  // Even and odd are the sums of bytes 2k and 2k + 1: out[t] = 2 * sum_t - bias.
  static void store(int16_t* out, int64_t, Bytes even, Bytes odd, int bias) {
    const Words e = (Words)even, o = (Words)odd;
    for (int k = 0; k < 8; ++k) {
      out[2 * k] = static_cast<int16_t>(2 * e[k] - bias);
      out[2 * k + 1] = static_cast<int16_t>(2 * o[k] - bias);
    }
  }
  static Bytes even_sums(Bytes low, Bytes odd) { return (Bytes)((Words)low - ((Words)odd << 8)); }
};

#if defined(__AVX2__)
struct Avx2 {
  static constexpr int64_t kBytes = 32;
  static constexpr int kStripes = 1;
  using Bytes = __m256i;

  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Bytes load(const uint8_t* p, int64_t bytes) {
    Bytes v = zero();
    std::memcpy(&v, p, static_cast<std::size_t>(bytes));
    return v;
  }
  static Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  static Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes add_words(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
  static Bytes odd_bytes(Bytes v) { return _mm256_srli_epi16(v, 8); }
  static Bytes even_sums(Bytes low, Bytes odd) {
    return _mm256_sub_epi16(low, _mm256_slli_epi16(odd, 8));
  }
  static void store(int16_t* out, int64_t tokens, Bytes even, Bytes odd, int bias) {
    if (tokens == 16) {  // two rows of the page share a vector
      even = add_words(even, _mm256_permute2x128_si256(even, even, 1));
      odd = add_words(odd, _mm256_permute2x128_si256(odd, odd, 1));
    }
    const Bytes offset = _mm256_set1_epi16(static_cast<int16_t>(bias));
    even = _mm256_sub_epi16(_mm256_slli_epi16(even, 1), offset);
    odd = _mm256_sub_epi16(_mm256_slli_epi16(odd, 1), offset);
    const Bytes first = _mm256_unpacklo_epi16(even, odd), second = _mm256_unpackhi_epi16(even, odd);
    auto* p = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(p, _mm256_permute2x128_si256(first, second, 0x20));
    if (tokens > 16) _mm256_storeu_si256(p + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
struct Avx512 {
  static constexpr int64_t kBytes = 64;
  static constexpr int kStripes = 2;
  using Bytes = __m512i;

  static Bytes zero() { return _mm512_setzero_si512(); }
  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load(const uint8_t* p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - bytes), p);
  }
  static Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
  static Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes add_words(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
  static Bytes odd_bytes(Bytes v) { return _mm512_srli_epi16(v, 8); }
  static Bytes even_sums(Bytes low, Bytes odd) {
    return _mm512_sub_epi16(low, _mm512_slli_epi16(odd, 8));
  }
  static void store(int16_t* out, int64_t tokens, Bytes even, Bytes odd, int bias) {
    if (tokens <= 32) {  // two or four rows of the page share a vector
      even = add_words(even, _mm512_shuffle_i64x2(even, even, 0x4e));
      odd = add_words(odd, _mm512_shuffle_i64x2(odd, odd, 0x4e));
    }
    if (tokens <= 16) {
      even = add_words(even, _mm512_shuffle_i64x2(even, even, 0xb1));
      odd = add_words(odd, _mm512_shuffle_i64x2(odd, odd, 0xb1));
    }
    const Bytes offset = _mm512_set1_epi16(static_cast<int16_t>(bias));
    even = _mm512_sub_epi16(_mm512_slli_epi16(even, 1), offset);
    odd = _mm512_sub_epi16(_mm512_slli_epi16(odd, 1), offset);
    const Bytes first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
    const Bytes low = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                                                second);
    if (tokens <= 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(low));
      return;
    }
    _mm512_storeu_si512(out, low);
    if (tokens <= 32) return;
    _mm512_storeu_si512(out + 32,
                        _mm512_permutex2var_epi64(
                            first, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), second));
  }};
#endif

}  // namespace sentencekv::cpu
