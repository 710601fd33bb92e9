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

constexpr int kRankThreads = 512;
constexpr int kRankWarps = kRankThreads / kWarp;
constexpr int kRankGroup = 8;  // query heads a KV head at most
constexpr int kFewBlocks = 4, kManyBlocks = 16;  // of the history a thread at most

/// S requests, H KV heads, G query heads a KV head, I sentences, N tokens and M rows a page.
struct RankSentencesArgs {
  int32_t* best;                 // [S, H, G, I] ordered logits; emptied
  const float* partial;          // [S, H, chunks, 2, G]
  const int32_t* row_pages;      // [S, .]
  uint8_t* kept;                 // [P * M, H] selected at the last step; written
  const int32_t* num_pages;      // [S]
  const int32_t* sentence_ends;  // [S, .]
  const int32_t* num_sentences;  // [S]
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
  int64_t row_pages_stride, ends_stride;
  int32_t num_requests, num_heads, group, block_size, rows_per_page;
  int32_t max_sentences, max_chunks, max_selected, max_blocks;
  int32_t chunk_tokens;
  int32_t token_bits, random, softmax_mean, max_of_group;  // values of the enumerations
};

/// What the block shares: a part of fixed size and a key for each block of the longest request.
struct RankShared {
  float merged[kRankWarps][2][kRankGroup];
  float shares[2][kRankGroup];
  float log_totals[kRankGroup];
  int32_t sums[4][kRankWarps];
  int32_t end_sentence;
  uint32_t keys[1];
};

inline bool rank_fits(const RankSentencesArgs& a) {
  return a.group <= kRankGroup && a.max_blocks <= kManyBlocks * kRankThreads;
}

inline size_t rank_shared_bytes(const RankSentencesArgs& a) {
  return sizeof(RankShared) + sizeof(uint32_t) * a.max_blocks;
}

/// triton_kernels/score_sentences.py: random_score.
__device__ inline float random_score(uint32_t seed, uint32_t step, uint32_t head, uint32_t sentence) {
  uint32_t x = seed * 0x9E3779B1u + step * 0x85EBCA77u + head * 0xC2B2AE3Du + sentence * 0x27D4EB2Fu;
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return static_cast<float>(x ^ x >> 16) * (1.0f / 4294967296.0f);
}

/// Where a sentence lies in the history, in tokens; nowhere if `end` is not above `start`.
struct Span {
  int start, end;

  __device__ bool inside() const { return start < end; }
};

/// One block of threads ranks the sentences of KV head h of request s and selects.
///
/// A thread takes kAtOnce sentences at a time and loads all of theirs before it uses any, from
/// the last sentence where there are fewer: a branch around a load would end the wait for it.
/// kGroup: query heads a KV head at most; kPer: blocks of the history a thread at most.
template <int kGroup, int kPer>
__device__ inline void rank_sentences(const RankSentencesArgs& a, RankShared& shared, int h,
                                      int s) {
  constexpr int kAtOnce = kGroup > 4 ? 2 : 4;
  const int heads = a.num_heads, group = a.group;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t head = static_cast<int64_t>(s) * heads + h;
  const int kind = a.index_kind[s], mode = a.reduce[s], count = a.num_sentences[s];
  const int n = a.block_size, lo = a.history_lo[s], hi = a.history_hi[s];
  const int budget = a.budget_blocks[s];
  const int32_t* ends = a.sentence_ends + s * a.ends_stride;
  const int32_t* row_pages = a.row_pages + s * a.row_pages_stride;
  int32_t* best = a.best + head * group * a.max_sentences;
  float* scores = a.scores + head * a.max_sentences;
  float* mass = a.mass + head * (a.max_sentences + 1);
  int32_t* blocks = a.blocks + head * a.max_selected;
  const bool share = kind != a.random && mode == a.softmax_mean;
  const float nan = float_of(0x7fc00000u);

  const auto nth = [&](int first, int k) { return min(first + k * kRankThreads, count - 1); };
  const auto read_spans = [&](int first, Span (&spans)[kAtOnce]) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = nth(first, k), before = ends[max(i - 1, 0)];
      spans[k] = {max(i > 0 ? before : 0, lo * n), min(ends[i], hi * n)};
    }
  };
  const auto code_of = [&](int g, int i) {
    return best + static_cast<int64_t>(min(g, group - 1)) * a.max_sentences + i;
  };
  const auto read_codes = [&](int first, int32_t (&codes)[kAtOnce][kGroup]) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) codes[k][g] = *code_of(g, nth(first, k));
    }
  };
  const auto find_flags = [&](int first, uint8_t* (&flags)[kAtOnce]) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = nth(first, k);
      const int64_t row = static_cast<int64_t>(row_pages[i / a.rows_per_page]) * a.rows_per_page +
                          i % a.rows_per_page;
      flags[k] = a.kept + row * heads + h;
    }
  };

  for (int j = thread; j < hi - lo; j += kRankThreads) shared.keys[j] = 0;
  if (thread == 0) shared.end_sentence = count;

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
        shared.shares[0][warp] = resident.top;
        shared.shares[1][warp] = resident.total;
      }
    }
    LogSum total[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) total[g] = LogSum::none();
    for (int first = thread; first < count; first += kAtOnce * kRankThreads) {
      Span spans[kAtOnce];
      int32_t codes[kAtOnce][kGroup];
      read_spans(first, spans);
      read_codes(first, codes);
      float logits[kAtOnce][kGroup];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const bool known = first + k * kRankThreads < count && spans[k].inside();
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          logits[k][g] = known && g < group ? from_ordered(codes[k][g]) : minus_infinity();
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float top = total[g].top;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) top = fmaxf(top, logits[k][g]);
        if (top == minus_infinity()) continue;
        float sum = total[g].total * expf(total[g].top - top);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) sum += expf(logits[k][g] - top);
        total[g] = {top, sum};
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float top = max_over(total[g].top, kWarp - 1);
      const float scaled = top == minus_infinity() ? 0.0f : total[g].total * expf(total[g].top - top);
      const float sum = sum_over(scaled, kWarp - 1);
      if (lane == 0) {
        shared.merged[warp][0][g] = top;
        shared.merged[warp][1][g] = sum;
      }
    }
    __syncthreads();
    if (warp < group) {
      const LogSum resident{shared.shares[0][warp], shared.shares[1][warp]};
      LogSum all = LogSum::none();
      if (lane < kRankWarps) all = {shared.merged[lane][0][warp], shared.merged[lane][1][warp]};
      all.merge_over(kWarp - 1);
      all.merge(resident);
      if (lane == 0) {
        const float log_total = all.top + logf(all.total);
        shared.log_totals[warp] = log_total;
        const bool none = resident.total == 0.0f;
        shared.shares[0][warp] = none ? 0.0f : resident.total * expf(resident.top - log_total);
      }
    }
  }
  __syncthreads();
  float resident_mass = share ? 0.0f : nan;
  if (share) {
    for (int g = 0; g < group; ++g) resident_mass += shared.shares[0][g];
    resident_mass /= group;
  }

  // A block's key is that of its best sentence; above 0 as an unsigned number, if it has one.
  const float bonus = a.retention[s];
  const uint32_t seed = a.seeds[s], step = *a.step;
  for (int first = thread; first < count; first += kAtOnce * kRankThreads) {
    Span spans[kAtOnce];
    int32_t codes[kAtOnce][kGroup];
    uint8_t* flags[kAtOnce];
    read_spans(first, spans);
    read_codes(first, codes);
    find_flags(first, flags);
    float bonuses[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) bonuses[k] = kind == a.random ? 0.0f : bonus * *flags[k];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kRankThreads;
      if (i >= count) continue;
      const bool inside = spans[k].inside();
      float score = 0.0f;
      if (kind == a.random) {
        score = random_score(seed, step, h, i);
      } else if (inside) {
        float logits[kGroup], largest = minus_infinity(), sum = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g >= group) continue;
          *code_of(g, i) = kLowest;
          logits[g] = from_ordered(codes[k][g]);
          if (mode == a.softmax_mean) logits[g] -= shared.log_totals[g];
          largest = fmaxf(largest, logits[g]);
        }
        // Relative to the largest: a mean below the smallest float keeps its rank.
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g >= group) continue;
          sum += mode == a.softmax_mean ? expf(logits[g] - largest) : logits[g];
        }
        score = mode == a.softmax_mean     ? largest + logf(sum / group)
                : mode == a.max_of_group ? largest
                                         : sum / group;
      }
      mass[i] = share ? (inside ? expf(score) : 0.0f) : nan;
      score = inside ? score + bonuses[k] : minus_infinity();
      scores[i] = score;
      if (score > minus_infinity()) {
        const uint32_t key = static_cast<uint32_t>(to_ordered(score)) ^ 0x80000000u;
        for (int j = spans[k].start / n; j * n < spans[k].end; ++j) {
          atomicMax(&shared.keys[j - lo], key);
        }
      }
    }
  }
  if (thread == 0) mass[a.max_sentences] = resident_mass;

  for (int k = budget + thread; k < a.max_selected; k += kRankThreads) blocks[k] = -1;
  if (budget == hi - lo) {
    for (int k = thread; k < budget; k += kRankThreads) blocks[k] = lo + k;
    if (thread == 0) a.coverage[head] = 1.0f;
    return;
  }
  __syncthreads();  // keys

  const int per = (hi - lo + kRankThreads - 1) / kRankThreads, begin = thread * per;
  const int own = max(0, min(per, hi - lo - begin));
  uint32_t keys[kPer];
#pragma unroll
  for (int m = 0; m < kPer; ++m) keys[m] = m < own ? shared.keys[begin + m] : 0;

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
    int32_t (*sums)[kRankWarps] = shared.sums + bit / 2 % 2 * 2;  // the others may be being read
    low = warp_sum(low);
    high = warp_sum(high);
    if (lane == 0) {
      sums[0][warp] = low;
      sums[1][warp] = high;
    }
    __syncthreads();
    low = warp_sum(lane < kRankWarps ? sums[0][lane] : 0);
    high = warp_sum(lane < kRankWarps ? sums[1][lane] : 0);
    const int digit = ((low & 0xffff) >= budget) + ((low >> 16) >= budget) + (high >= budget);
    threshold |= static_cast<uint32_t>(digit) << bit;
  }

  int both = 0;  // keys above the threshold and, 16 bits up, those at it
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    if (m >= own) continue;
    both += (keys[m] > threshold) + ((keys[m] == threshold) << 16);
  }
  const Scan scan = block_scan(both, shared.sums[0]);
  const int missing = budget - (scan.total & 0xffff), ties_before = scan.before >> 16;
  int position = (scan.before & 0xffff) + min(ties_before, missing);
  int left = max(0, missing - ties_before), last_tied = -1;
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    if (m >= own) continue;
    const bool tie = keys[m] == threshold;
    if (keys[m] > threshold || (tie && left > 0)) {
      blocks[position++] = lo + begin + m;
      if (tie) {
        --left;
        last_tied = lo + begin + m;
      }
    }
  }

  // The last tied block came with the first sentence of that score that touches it; equally good
  // sentences after it were not taken.
  last_tied = max_over(last_tied, kWarp - 1);
  if (lane == 0) shared.sums[1][warp] = last_tied;
  __syncthreads();
  const int end_block = max_over(lane < kRankWarps ? shared.sums[1][lane] : -1, kWarp - 1);
  const int32_t end_code = static_cast<int32_t>(threshold ^ 0x80000000u);
  for (int first = thread; first < count; first += kAtOnce * kRankThreads) {
    Span spans[kAtOnce];
    float ranks[kAtOnce];
    read_spans(first, spans);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) ranks[k] = scores[nth(first, k)];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool touches = spans[k].start < (end_block + 1) * n && spans[k].end > end_block * n;
      if (to_ordered(ranks[k]) == end_code && touches) {
        atomicMin(&shared.end_sentence, nth(first, k));
      }
    }
  }
  __syncthreads();
  const int end_sentence = shared.end_sentence;
  float covered = 0.0f;
  for (int first = thread; first < count; first += kAtOnce * kRankThreads) {
    float ranks[kAtOnce], parts[kAtOnce];
    uint8_t* flags[kAtOnce];
    find_flags(first, flags);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      ranks[k] = scores[nth(first, k)];
      parts[k] = mass[nth(first, k)];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kRankThreads;
      if (i >= count) continue;
      const int32_t code = to_ordered(ranks[k]);
      const bool taken = ranks[k] > minus_infinity() &&
                         (code > end_code || (code == end_code && i <= end_sentence));
      *flags[k] = taken;
      if (taken) covered += parts[k];
    }
  }
  covered = sum_over(covered, kWarp - 1);
  if (lane == 0) shared.merged[warp][0][0] = covered;
  __syncthreads();
  if (warp == 0) {
    covered = sum_over(lane < kRankWarps ? shared.merged[lane][0][0] : 0.0f, kWarp - 1);
    if (lane == 0) a.coverage[head] = covered + resident_mass;
  }
}

/// Grid (H, S).
template <int kGroup, int kPer>
static __global__ void __launch_bounds__(kRankThreads, 1)
    rank_sentences_kernel(const RankSentencesArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  rank_sentences<kGroup, kPer>(a, *reinterpret_cast<RankShared*>(shared_memory), blockIdx.x,
                               blockIdx.y);
}

}  // namespace sentencekv
