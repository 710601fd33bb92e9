// SPDX-License-Identifier: Apache-2.0
// From logits to the selected blocks. Defined by sentencekv_vllm/ops/score_sentences.py (the
// reduction over the group) and select_blocks.py; triton_kernels/ has both in Triton.
//
// One cluster of blocks of threads for each KV head of a request: each ranks its share of the
// sentences, the first selects. Loops are short and not unrolled: a step runs them once or
// twice, after other kernels, and instructions have to be fetched, too.
#pragma once

#include "granule.hpp"
#include "rank_args.cuh"
#include "warp.cuh"

namespace sentencekv {

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

/// The sentences of one KV head of a request, as a block of threads sees them.
///
/// kGroup: query heads a KV head at most. Loads are unconditional, of query head 0 where there
/// are fewer: a branch around a load would end the wait for it.
template <int kGroup>
struct HeadSentences {
  const RankArgs& a;
  Cluster cluster;
  int h, kind, mode, count, n, lo, hi, begin, end;
  bool is_random;
  int group;
  int64_t head;
  const int32_t* ends;
  const int32_t* row_pages;
  int32_t* best;
  bool shares;  // the score is a share of attention

  __device__ HeadSentences(const RankArgs& a, const Cluster& cluster, int h, int s)
      : a(a), cluster(cluster), h(h), kind(a.index_kind[s]), mode(a.reduce[s]),
        count(a.num_sentences[s]), n(a.block_size), lo(a.history_lo[s]), hi(a.history_hi[s]),
        is_random(kind == a.random), group(a.group),
        head(static_cast<int64_t>(s) * a.num_heads + h), ends(a.sentence_ends + s * a.ends_stride),
        row_pages(a.row_pages + s * a.row_pages_stride),
        best(a.best + head * a.max_sentences * group),
        shares(!is_random && mode == a.softmax_mean) {
    const int share = (count + cluster.size - 1) / cluster.size;
    begin = min(cluster.rank * share, count);
    end = min(begin + share, count);
  }

  __device__ Span span(int i) const {
    const int before = ends[max(i - 1, 0)];
    return {max(i > 0 ? before : 0, lo * n), min(ends[i], hi * n)};
  }

  __device__ int32_t* code(int g, int i) const { return best + i * group + (g < group ? g : 0); }

  __device__ uint8_t* flag(int i) const {
    const int64_t page = row_pages[i / a.rows_per_page];
    return a.kept + (page * a.rows_per_page + i % a.rows_per_page) * a.num_heads + h;
  }
};

/// The denominator of each query head: all sentences of the history.
template <int kGroup>
__device__ inline void sum_shares(const HeadSentences<kGroup>& own, RankShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = own.group;
  LogSum total[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) total[g] = LogSum::none();
#pragma unroll 1
  for (int i = own.begin + static_cast<int>(threadIdx.x); i < own.end; i += kRankThreads) {
    const Span span = own.span(i);
    int32_t codes[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) codes[g] = *own.code(g, i);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      total[g].add(span.inside() ? from_ordered(codes[g]) : minus_infinity());
    }
    if (own.a.kept != nullptr) prefetch(own.flag(i));  // for `score_sentences`
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    total[g].merge_over(kWarp - 1);
    if (lane == 0) {
      shared.merged[warp][0][g] = total[g].top;
      shared.merged[warp][1][g] = total[g].total;
    }
  }
  own.cluster.sync();
  if (warp < group) {
    LogSum all = LogSum::none();
#pragma unroll 4
    for (int w = lane; w < kRankWarps * own.cluster.size; w += kWarp) {
      const float(*theirs)[2][kRankGroup] = own.cluster.at(shared.merged, w / kRankWarps);
      all.merge({theirs[w % kRankWarps][0][warp], theirs[w % kRankWarps][1][warp]});
    }
    all.merge_over(kWarp - 1);
    if (lane == 0) shared.log_totals[warp] = all.top + logf(all.total);
  }
  __syncthreads();
}

/// The score of a sentence of the history.
template <int kGroup>
__device__ inline float reduce_group(const HeadSentences<kGroup>& own, const int32_t (&codes)[kGroup],
                                     const float* log_totals) {
  const bool is_share = own.mode == own.a.softmax_mean;
  float logits[kGroup], largest = minus_infinity(), sum = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    logits[g] = from_ordered(codes[g]) - (is_share ? log_totals[g] : 0.0f);
    if (g < own.group) largest = fmaxf(largest, logits[g]);
  }
  // Relative to the largest: a mean below the smallest float keeps its rank.
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float part = is_share ? expf(logits[g] - largest) : logits[g];
    if (g < own.group) sum += part;
  }
  if (is_share) return largest + logf(sum / own.group);
  return own.mode == own.a.max_of_group ? largest : sum / own.group;
}

/// Scores, masses, and the keys of blocks: that of a block's best sentence, above 0 as an unsigned
/// number, if it has one. The first block of the cluster holds them.
template <int kGroup>
__device__ inline void score_sentences(const HeadSentences<kGroup>& own, RankShared& shared, int s) {
  const RankArgs& a = own.a;
  const float bonus = a.retention[s], nan = float_of(0x7fc00000u);
  const uint32_t seed = a.seeds[s], step = *a.step;
  float* scores = a.scores + own.head * a.max_sentences;
  float* mass = a.mass + own.head * a.max_sentences;
  uint32_t* keys = own.cluster.at(shared.keys, 0);
  uint32_t largest = 0, inverse_least = 0;
#pragma unroll 1
  for (int i = own.begin + static_cast<int>(threadIdx.x); i < own.end; i += kRankThreads) {
    const Span span = own.span(i);
    int32_t codes[kGroup];
    float retained = 0.0f;
    if (!own.is_random) {
      if (a.kept != nullptr) retained = bonus * *own.flag(i);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) codes[g] = *own.code(g, i);
    }
    const bool inside = span.inside();
    float score = own.is_random ? random_score(seed, step, own.h, i)
                            : reduce_group(own, codes, shared.log_totals);
    mass[i] = own.shares ? (inside ? expf(score) : 0.0f) : nan;
    score = inside ? score + retained : minus_infinity();
    scores[i] = score;
    if (!inside) continue;
    if (!own.is_random) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) *own.code(g, i) = kLowest;
    }
    if (score == minus_infinity()) continue;
    const uint32_t key = static_cast<uint32_t>(to_ordered(score)) ^ 0x80000000u;
    largest = max(largest, key);
    inverse_least = max(inverse_least, ~key);
    const int last = (span.end - 1) / own.n - own.lo;
#pragma unroll 1
    for (int j = span.start / own.n - own.lo; j <= last; ++j) atomicMax(&keys[j], key);
  }
  largest = max_over(largest, kWarp - 1);
  inverse_least = max_over(inverse_least, kWarp - 1);
  if (threadIdx.x % kWarp == 0) {
    SelectShared* select = own.cluster.at(&shared.select, 0);
    atomicMax(&select->largest, largest);
    atomicMax(&select->inverse_least, inverse_least);
  }
}

/// The last tied block came with the first sentence of that score that touches it; equally good
/// sentences after it were not taken. The calling warp finds it; 32 sentences at a time.
template <int kGroup>
__device__ inline int find_end_sentence(const HeadSentences<kGroup>& own, int s, int end_block,
                                        int32_t end_code) {
  const int lane = threadIdx.x % kWarp;
  const float* scores = own.a.scores + own.head * own.a.max_sentences;
  const int from = end_block * own.n, to = from + own.n;
  int i = (own.a.first + s * own.a.first_stride)[from / kGranule];
  for (; i < own.count; i += kWarp) {
    const int mine = min(i + lane, own.count - 1);
    const Span span = own.span(mine);
    const bool found = i + lane < own.count && to_ordered(scores[mine]) == end_code &&
                       span.start < to && span.end > from;
    const unsigned all = __ballot_sync(kAllLanes, found);
    if (all != 0) return i + __ffs(static_cast<int>(all)) - 1;
    if (own.ends[min(i + kWarp, own.count) - 1] >= to) break;
  }
  return own.count;
}

/// Mark the selected sentences of a block's share; returns its part of their mass, in warp 0.
template <int kGroup>
__device__ inline float mark_selected(const HeadSentences<kGroup>& own, RankShared& shared,
                                      int32_t end_code, int end_sentence) {
  const RankArgs& a = own.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* scores = a.scores + own.head * a.max_sentences;
  const float* mass = a.mass + own.head * a.max_sentences;
  float covered = 0.0f;
#pragma unroll 1
  for (int i = own.begin + static_cast<int>(threadIdx.x); i < own.end; i += kRankThreads) {
    const float score = scores[i], part = mass[i];
    const int32_t code = to_ordered(score);
    const bool taken = score > minus_infinity() &&
                       (code > end_code || (code == end_code && i <= end_sentence));
    if (a.kept != nullptr) *own.flag(i) = taken;
    covered += taken ? part : 0.0f;
  }
  covered = sum_over(covered, kWarp - 1);
  if (lane == 0) shared.merged[warp][0][0] = covered;
  __syncthreads();
  return sum_over(lane < kRankWarps ? shared.merged[lane][0][0] : 0.0f, kWarp - 1);
}

/// A cluster ranks the sentences of KV head h of request s, and its first block selects.
///
/// Returns whether all of the history was selected. After a barrier of the cluster `add_coverage`.
template <int kGroup>
__device__ inline bool rank_sentences(const RankArgs& a, const Cluster& cluster,
                                      RankShared& shared, int h, int s) {
  const HeadSentences<kGroup> own(a, cluster, h, s);
  const int thread = threadIdx.x, history = own.hi - own.lo, budget = a.budget_blocks[s];
  const bool leads = cluster.rank == 0;
  int32_t* blocks = a.blocks + own.head * a.max_selected;

  if (leads) {
    for (int j = thread; j < history; j += kRankThreads) shared.keys[j] = 0;
    if (thread == 0) shared.select.largest = shared.select.inverse_least = 0;
  }
  if (own.shares) {
    sum_shares(own, shared);
  } else {
    cluster.sync();  // keys
  }
  score_sentences(own, shared, s);
  cluster.sync();

  if (leads) {
    for (int k = budget + thread; k < a.max_selected; k += kRankThreads) blocks[k] = -1;
  }
  if (budget == history) {
    if (leads) {
      for (int k = thread; k < budget; k += kRankThreads) blocks[k] = own.lo + k;
    }
    return true;
  }

  if (leads) {
    const Threshold threshold = find_threshold(shared.keys, history, budget, shared.select);
    const int end_block =
        own.lo + write_selected(shared.keys, history, threshold, own.lo, blocks, shared.select);
    const int32_t end_code = static_cast<int32_t>(threshold.key ^ 0x80000000u);
    if (thread < kWarp) {
      const int end_sentence =
          threshold.ties > 0 ? find_end_sentence(own, s, end_block, end_code) : -1;
      if (thread == 0) {
        shared.end_code = end_code;
        shared.end_sentence = end_sentence;
      }
    }
  }
  cluster.sync();
  const float covered = mark_selected(own, shared, *cluster.at(&shared.end_code, 0),
                                      *cluster.at(&shared.end_sentence, 0));
  if (thread == 0) *cluster.at(&shared.covered[cluster.rank], 0) = covered;
  return false;
}

}  // namespace sentencekv
