// SPDX-License-Identifier: Apache-2.0
// Products of integer levels with signs, counted by tensor cores.
//
// A query head's levels, six-bit integers, are six planes of bits, and a product of levels with
// sign bits is a weighted sum of counts of common ones: tensor cores count the planes of four
// query heads against sixteen tokens in three instructions, and the sign bits need no unpacking.
#pragma once

#include "fixed_point.cuh"
#include "warp.cuh"

namespace sentencekv {

constexpr int kPlanes = 6;           // bits of a level
constexpr int kSetHeads = 4;         // query heads whose planes fill the columns of kSetTiles
constexpr int kSetTiles = kSetHeads * kPlanes / 8;
constexpr int kStepBytes = 16;       // byte rows (of 8 code planes) of one product
constexpr int kMaxByteRows = 32;
constexpr int kMaxWords = kMaxByteRows / 4;  // of a plane
constexpr int kMaxGroup = 8;

/// The planes of a KV head's query heads, and their levels, from which they are made.
struct PlanesShared {
  uint32_t planes[kMaxGroup][kPlanes][kMaxWords];
  alignas(8) int8_t levels[kMaxGroup * kMaxByteRows * 8];  // [G, W]
};

/// Bytes k of the four words, in order, for k of 0 to 3.
__device__ inline void transpose_bytes(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const uint32_t low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
  const uint32_t low2 = __byte_perm(c, d, 0x5140), high2 = __byte_perm(c, d, 0x7362);
  a = __byte_perm(low, low2, 0x5410);
  b = __byte_perm(low, low2, 0x7632);
  c = __byte_perm(high, high2, 0x5410);
  d = __byte_perm(high, high2, 0x7632);
}

/// Bit `plane` of four bytes, as the low four bits.
__device__ inline uint32_t plane_of(uint32_t bytes, int plane) {
  return ((bytes >> plane & 0x01010101u) * 0x01020408u) >> 24 & 15u;
}

/// The byte rows of one product: byte i of the word that lane quarter q contributes is row
/// `first + i * stride`, so that the quarters of one load are neighbours.
struct StepRows {
  int first, stride, end;

  __device__ StepRows(int step, int q, int num_rows) {
    const int begin = step * kStepBytes;
    end = min(num_rows, begin + kStepBytes);
    stride = (end - begin + 3) / 4;
    first = q < stride ? begin + q : end;
  }

  __device__ int row(int i) const { return first + i * stride; }
  __device__ bool has(int i) const { return row(i) < end; }
};

/// The planes of `group` query heads of `num_rows` byte rows, by a block of threads. A barrier must
/// follow.
__device__ inline void read_planes(PlanesShared& shared, const int8_t* levels, int group,
                                   int num_rows) {
  const uint32_t* source = reinterpret_cast<const uint32_t*>(levels);
  uint32_t* copied = reinterpret_cast<uint32_t*>(shared.levels);
  const int threads = static_cast<int>(blockDim.x), words = group * num_rows * 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < words; i += threads) copied[i] = source[i];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < group * kPlanes * kMaxWords; i += threads) {
    const int word = i % kMaxWords, plane = i / kMaxWords % kPlanes, g = i / kMaxWords / kPlanes;
    const StepRows rows(word / 4, word % 4, num_rows);
    uint32_t bits = 0;
    for (int k = 0; k < 4; ++k) {
      if (!rows.has(k)) continue;
      const uint32_t* pair = copied + (g * num_rows + rows.row(k)) * 2;
      bits |= (plane_of(pair[0], plane) | plane_of(pair[1], plane) << 4) << 8 * k;
    }
    shared.planes[g][plane][word] = bits;
  }
}

/// What a lane needs of the levels of the query heads of one set.
///
/// Column 2 i + j of tile t is plane 2 t + j of the set's head i: lane 4 r + q gets all planes of
/// head q of the set.
template <int kSteps>
struct HeadSet {
  uint32_t planes[kSetTiles][kSteps];
  int level_sum;

  __device__ void read(const PlanesShared& shared, int set, int group, int num_rows) {
    const int row = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    const int column_head = set * kSetHeads + row / 2;
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t word =
            shared.planes[min(column_head, group - 1)][2 * t + row % 2][4 * step + q];
        const bool there = StepRows(step, q, num_rows).has(0) && column_head < group;
        planes[t][step] = there ? word : 0;
      }
    }
    uint32_t ones[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ones[step] = 0xffffffffu;
    int twice, same;
    products(0, ones, ones, twice, same);
    level_sum = twice / 2;
  }

  /// `start` plus twice the products of the levels and the bits of two tokens; plus the products
  /// with their signs, which are 2 * bit - 1, if -level_sum is added.
  __device__ void products(int start, const uint32_t (&upper)[kSteps],
                           const uint32_t (&lower)[kSteps], int& first, int& second) const {
    first = second = start;
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
      int counts[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_common_bits(counts, upper[step], lower[step], planes[t][step]);
      }
      const int low = 2 << 2 * t, high = t + 1 == kSetTiles ? -2 * low : 2 * low;  // the sign's
      first += low * counts[0] + high * counts[1];
      second += low * counts[2] + high * counts[3];
    }
  }
};

}  // namespace sentencekv
