// SPDX-License-Identifier: Apache-2.0
// C ABI of rank_sentences: one launch for all requests and KV heads of a layer.
#include <sentencekv/rank_sentences.cuh>

using sentencekv::RankSentencesArgs;

/// Returns cudaErrorInvalidValue for groups above 8 or requests of more than 8192 blocks.
extern "C" cudaError_t sentencekv_rank_sentences(const RankSentencesArgs* args,
                                                 cudaStream_t stream) {
  const RankSentencesArgs& a = *args;
  if (!sentencekv::rank_fits(a)) return cudaErrorInvalidValue;
  const bool few = a.max_blocks <= sentencekv::kFewBlocks * sentencekv::kRankThreads;
  const auto kernel =
      a.group <= 4
          ? (few ? sentencekv::rank_sentences_kernel<4, sentencekv::kFewBlocks>
                 : sentencekv::rank_sentences_kernel<4, sentencekv::kManyBlocks>)
          : (few ? sentencekv::rank_sentences_kernel<8, sentencekv::kFewBlocks>
                 : sentencekv::rank_sentences_kernel<8, sentencekv::kManyBlocks>);
  return sentencekv::launch(kernel, dim3(a.num_heads, a.num_requests), sentencekv::kRankThreads,
                            sentencekv::rank_shared_bytes(a), stream, a);
}
