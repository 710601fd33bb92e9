// SPDX-License-Identifier: Apache-2.0
// C ABI of rank_sentences: one launch for all requests and KV heads of a layer.
#include <sentencekv/rank_sentences.cuh>

using sentencekv::RankSentencesArgs;

/// Returns cudaErrorInvalidValue for groups above 8 or requests of more than 8192 blocks.
extern "C" cudaError_t sentencekv_rank_sentences(const RankSentencesArgs* args,
                                                 cudaStream_t stream) {
  const RankSentencesArgs& a = *args;
  constexpr int few = 2, many = 8;  // blocks a thread
  if (a.group > sentencekv::kRankGroup || a.max_blocks > many * sentencekv::kRankThreads) {
    return cudaErrorInvalidValue;
  }
  const bool is_short = a.max_blocks <= few * sentencekv::kRankThreads;
  const auto kernel =
      a.group <= 4 ? (is_short ? sentencekv::rank_sentences_kernel<4, few>
                               : sentencekv::rank_sentences_kernel<4, many>)
                   : (is_short ? sentencekv::rank_sentences_kernel<8, few>
                               : sentencekv::rank_sentences_kernel<8, many>);
  return sentencekv::launch(kernel, dim3(a.num_heads, a.num_requests), sentencekv::kRankThreads,
                            sentencekv::rank_shared_bytes(), stream, a);
}
