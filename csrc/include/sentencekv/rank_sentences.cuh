// SPDX-License-Identifier: Apache-2.0
// From logits to the selected blocks. Defined by sentencekv_vllm/ops/score_sentences.py (the
// reduction over the group) and select_blocks.py; triton_kernels/ has both in Triton.
//
// One block of threads for each KV head of a request: scores stay in its caches, and no launch
// lies between the steps. The key that ends the selection is found two bits at a time.
#pragma once

#include "block_scan.cuh"
#include "warp.cuh"

namespace sentencekv {

constexpr int kRankThreads = 1024;
constexpr int kRankWarps = kRankThreads / kWarp;
constexpr int kRankGroup = 8;  // query heads a KV head at most

/// S requests, H KV heads, G query heads a KV head, I sentences, N tokens and M rows a page.
struct RankSentencesArgs {
  int32_t* best;                 // [S, H, G, I] ordered logits; emptied
  const float* partial;          // [S, H, chunks, 2, G]
  const int32_t* row_pages;      // [S, .]
  uint8_t* kept;                 // [P * M, H] selected at the last step; written
  const int32_t* num_pages;      // [S]
  const int32_t* sentence_ends;  // [S, .]
  const int32_t* num_sentences;  // [S]
  const int32_t* first;          // [S, .]
  const int32_t* history_lo;     // [S] blocks
  const int32_t* history_hi;     // [S]
  const int32_t* budget_blocks;  // [S]
  const int32_t* index_kind;     // [S]
  const int32_t* reduce;         // [S]
  const float* retention;        // [S]
  const int32_t* seeds;          // [S]
  const int32_t* step;           // [1]
  float* scores;                 // [S, H, I] written up to num_sentences
  float* mass;                   // [S, H, I + 1] the same, and the resident tokens' at I
  int32_t* blocks;               // [S, H, K] written: ascending, then -1
  float* coverage;               // [S, H] written
  int64_t row_pages_stride, ends_stride, first_stride;
  int32_t num_requests, num_heads, group, block_size, rows_per_page;
  int32_t max_sentences, max_chunks, max_selected, max_blocks;
  int32_t chunk_tokens, granule;
  int32_t token_bits, random, softmax_mean, max_of_group;  // values of the enumerations
};

inline size_t rank_shared_bytes() {
  return sizeof(float) * (kRankWarps * 2 + 3) * kRankGroup + sizeof(int32_t) * (4 * kRankWarps + 1);
}

/// triton_kernels/score_sentences.py: random_score.
__device__ inline float random_score(uint32_t seed, uint32_t step, uint32_t head, uint32_t sentence) {
  uint32_t x = seed * 0x9E3779B1u + step * 0x85EBCA77u + head * 0xC2B2AE3Du + sentence * 0x27D4EB2Fu;
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return static_cast<float>(x ^ x >> 16) * (1.0f / 4294967296.0f);
}

/// Grid (H, S). kGroup: query heads a KV head at most; kPer: consecutive blocks of the history that
/// a thread has at most.
template <int kGroup, int kPer>
static __global__ void __launch_bounds__(kRankThreads)
    rank_sentences_kernel(const RankSentencesArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* merged = reinterpret_cast<float*>(shared_memory);  // [warps, 2, kRankGroup]
  float* shares = merged + kRankWarps * 2 * kRankGroup;                  // [2, kRankGroup]
  float* log_totals = shares + 2 * kRankGroup;                           // [kRankGroup]
  int32_t* sums = reinterpret_cast<int32_t*>(log_totals + kRankGroup);   // [4, warps]
  int32_t* found = sums + 4 * kRankWarps;

  const int h = blockIdx.x, s = blockIdx.y, heads = a.num_heads, group = a.group;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t head = static_cast<int64_t>(s) * heads + h;
  const int kind = a.index_kind[s], mode = a.reduce[s], count = a.num_sentences[s];
  const int n = a.block_size, lo = a.history_lo[s], hi = a.history_hi[s];
  const int lo_token = lo * n, hi_token = hi * n, budget = a.budget_blocks[s];
  const int32_t* ends = a.sentence_ends + s * a.ends_stride;
  const int32_t* first = a.first + s * a.first_stride;
  const int32_t* row_pages = a.row_pages + s * a.row_pages_stride;
  int32_t* best = a.best + head * group * a.max_sentences;
  float* scores = a.scores + head * a.max_sentences;
  float* mass = a.mass + head * (a.max_sentences + 1);
  int32_t* blocks = a.blocks + head * a.max_selected;
  const bool share = kind != a.random && mode == a.softmax_mean;
  const float nan = float_of(0x7fc00000u);

  const auto touches = [&](int i) {
    const int start = i > 0 ? ends[i - 1] : 0;
    return max(start, lo_token) < min(ends[i], hi_token);
  };
  const auto kept_flag = [&](int i) {
    const int64_t row = static_cast<int64_t>(row_pages[i / a.rows_per_page]) * a.rows_per_page +
                        i % a.rows_per_page;
    return a.kept + row * heads + h;
  };

  // The denominator of each query head: resident tokens and all sentences of the history.
  if (share) {
    if (warp < group) {
      LogSum resident = LogSum::none();
      if (kind == a.token_bits) {
        const int chunks = (a.num_pages[s] * n + a.chunk_tokens - 1) / a.chunk_tokens;
        for (int c = lane; c < chunks; c += kWarp) {
          const float* source = a.partial + (head * a.max_chunks + c) * 2 * group + warp;
          resident.merge({source[0], source[group]});
        }
      }
      resident.merge_over(kWarp - 1);
      if (lane == 0) {
        shares[warp] = resident.top;
        shares[kRankGroup + warp] = resident.total;
      }
    }
    LogSum total[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) total[g] = LogSum::none();
    for (int i = thread; i < count; i += kRankThreads) {
      if (!touches(i)) continue;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (g < group) {
          total[g].add(from_ordered(best[static_cast<int64_t>(g) * a.max_sentences + i]));
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      total[g].merge_over(kWarp - 1);
      if (lane == 0) {
        merged[(warp * 2 + 0) * kRankGroup + g] = total[g].top;
        merged[(warp * 2 + 1) * kRankGroup + g] = total[g].total;
      }
    }
    __syncthreads();
    if (warp < group) {
      const LogSum resident{shares[warp], shares[kRankGroup + warp]};
      LogSum all{merged[(lane * 2 + 0) * kRankGroup + warp],
                 merged[(lane * 2 + 1) * kRankGroup + warp]};
      all.merge_over(kWarp - 1);
      all.merge(resident);
      if (lane == 0) {
        const float log_total = all.top + logf(all.total);
        log_totals[warp] = log_total;
        const bool none = resident.total == 0.0f;
        shares[warp] = none ? 0.0f : resident.total * expf(resident.top - log_total);
      }
    }
    __syncthreads();
  }
  float resident_mass = share ? 0.0f : nan;
  if (share) {
    for (int g = 0; g < group; ++g) resident_mass += shares[g];
    resident_mass /= group;
  }

  const float bonus = a.retention[s];
  for (int i = thread; i < count; i += kRankThreads) {
    const bool inside = touches(i);
    float score = minus_infinity();
    if (kind == a.random) {
      score = random_score(a.seeds[s], *a.step, h, i);
    } else if (inside) {
      float logits[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (g >= group) continue;
        int32_t* code = best + static_cast<int64_t>(g) * a.max_sentences + i;
        logits[g] = from_ordered(*code);
        *code = kLowest;
      }
      if (mode == a.softmax_mean) {
        float largest = minus_infinity(), sum = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g < group) largest = fmaxf(largest, logits[g] -= log_totals[g]);
        }
        // Relative to the largest: a mean below the smallest float keeps its rank.
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g < group) sum += expf(logits[g] - largest);
        }
        score = largest + logf(sum / group);
      } else if (mode == a.max_of_group) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g < group) score = fmaxf(score, logits[g]);
        }
      } else {
        score = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g < group) score += logits[g];
        }
        score /= group;
      }
    }
    mass[i] = share ? (inside ? expf(score) : 0.0f) : nan;
    if (kind != a.random && inside) score += bonus * *kept_flag(i);
    scores[i] = inside ? score : minus_infinity();
  }
  if (thread == 0) mass[a.max_sentences] = resident_mass;

  for (int k = budget + thread; k < a.max_selected; k += kRankThreads) blocks[k] = -1;
  if (budget == hi - lo) {
    for (int k = thread; k < budget; k += kRankThreads) blocks[k] = lo + k;
    if (thread == 0) a.coverage[head] = 1.0f;
    return;
  }
  __syncthreads();  // scores

  // A block's key is that of its best sentence; above 0 as an unsigned number, if it has one.
  const int per = (hi - lo + kRankThreads - 1) / kRankThreads, begin = lo + thread * per;
  const int own = max(0, min(per, hi - begin));
  uint32_t keys[kPer];
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    keys[m] = 0;
    if (m >= own) continue;
    const int j = begin + m, per_block = n / a.granule;
    const int sentence = first[j * per_block];
    int last = first[(j + 1) * per_block];
    // The sentence of the next block's first token may begin there.
    if (last > sentence && ends[last - 1] == (j + 1) * n) --last;
    last = min(last, count - 1);
    int32_t code = kLowest;
    for (int i = sentence; i <= last; ++i) {
      const float score = scores[i];
      if (score > minus_infinity()) code = max(code, to_ordered(score));
    }
    keys[m] = static_cast<uint32_t>(code) ^ 0x80000000u;
  }

  // The largest threshold that at least `budget` keys reach, from the highest bits down.
  uint32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit -= 2) {
    int low = 0, high = 0;  // keys that reach digit 1 and, 16 bits up, 2; keys that reach 3
#pragma unroll
    for (int m = 0; m < kPer; ++m) {
      if (m >= own) continue;
      low += keys[m] >= (threshold | 1u << bit);
      low += (keys[m] >= (threshold | 2u << bit)) << 16;
      high += keys[m] >= (threshold | 3u << bit);
    }
    int32_t* warp_sums = sums + (bit / 2 % 2) * 2 * kRankWarps;  // the round before may be reading
    low = warp_sum(low);
    high = warp_sum(high);
    if (lane == 0) {
      warp_sums[warp] = low;
      warp_sums[kRankWarps + warp] = high;
    }
    __syncthreads();
    low = warp_sum(warp_sums[lane]);
    high = warp_sum(warp_sums[kRankWarps + lane]);
    const int digit = ((low & 0xffff) >= budget) + ((low >> 16) >= budget) + (high >= budget);
    threshold |= static_cast<uint32_t>(digit) << bit;
  }

  int above = 0, tied = 0;
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    if (m >= own) continue;
    above += keys[m] > threshold;
    tied += keys[m] == threshold;
  }
  const Scan ties = block_scan(tied, sums);
  const int missing = budget - block_scan(above, sums).total;
  const int taken_ties = max(0, min(tied, missing - ties.before));
  const Scan chosen = block_scan(above + taken_ties, sums);
  int position = chosen.before, left = taken_ties, last_tied = -1;
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    if (m >= own) continue;
    const bool tie = keys[m] == threshold;
    if (keys[m] > threshold || (tie && left > 0)) {
      blocks[position++] = begin + m;
      if (tie) {
        --left;
        last_tied = begin + m;
      }
    }
  }

  // The last tied block came with the first sentence of that score that touches it; equally good
  // sentences after it were not taken.
  last_tied = max_over(last_tied, kWarp - 1);
  __syncthreads();
  if (lane == 0) sums[warp] = last_tied;
  if (thread == 0) found[0] = count;
  __syncthreads();
  const int end_block = max_over(sums[lane], kWarp - 1);
  const int32_t end_code = static_cast<int32_t>(threshold ^ 0x80000000u);
  if (end_block >= 0) {
    const int from = first[end_block * (n / a.granule)];
    for (int i = from + thread; i < min(count, from + n); i += kRankThreads) {
      if (to_ordered(scores[i]) == end_code) atomicMin(found, i);
    }
  }
  __syncthreads();
  const int end_sentence = found[0];
  float covered = 0.0f;
  for (int i = thread; i < count; i += kRankThreads) {
    const float score = scores[i];
    const int32_t code = to_ordered(score);
    const bool taken = score > minus_infinity() &&
                       (code > end_code || (code == end_code && i <= end_sentence));
    *kept_flag(i) = taken;
    if (taken) covered += mass[i];
  }
  covered = sum_over(covered, kWarp - 1);
  if (lane == 0) merged[warp] = covered;
  __syncthreads();
  if (warp == 0) {
    covered = sum_over(merged[lane], kWarp - 1);
    if (lane == 0) a.coverage[head] = covered + resident_mass;
  }
}

}  // namespace sentencekv
