// SPDX-License-Identifier: Apache-2.0
// C ABI of score_tokens: one launch for all requests and KV heads of a layer.
#include <sentencekv/score_tokens.cuh>

using sentencekv::ScoreTokensArgs;

namespace {

template <int kSets>
void (*kernel_of(const ScoreTokensArgs& a))(ScoreTokensArgs) {
  using namespace sentencekv;
  const bool one_step = a.num_byte_rows <= kStepBytes;
  if (a.query == nullptr) {
    return one_step ? score_tokens_kernel<kSets, 0, 1> : score_tokens_kernel<kSets, 0, 2>;
  }
  if (!one_step) return score_tokens_kernel<kSets, 8, 2>;
  return a.num_byte_rows == kStepBytes ? score_tokens_kernel<kSets, 4, 1>
                                       : score_tokens_kernel<kSets, 2, 1>;
}

}  // namespace

/// Returns cudaErrorInvalidValue for groups above 8, more than 256 channels, pages that are no
/// multiple of 16 tokens, and queries whose channels are not 64, 128 or 256 and all indexed.
extern "C" cudaError_t sentencekv_score_tokens(const ScoreTokensArgs* args, cudaStream_t stream) {
  ScoreTokensArgs a = *args;
  const int rows = a.num_byte_rows;
  if (a.group > sentencekv::kMaxGroup || rows > sentencekv::kMaxByteRows ||
      a.block_size % sentencekv::kGranule != 0 ||
      (a.query != nullptr && rows != 8 && rows != 16 && rows != 32)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel =
      a.group <= sentencekv::kSetHeads ? kernel_of<1>(a) : kernel_of<2>(a);
  a.granules_per_page = a.block_size / sentencekv::kGranule;
  a.page_factor = sentencekv::reciprocal(a.granules_per_page);
  const int chunk_tokens = sentencekv::kChunkTokens;
  const int chunks = (a.max_pages * a.block_size + chunk_tokens - 1) / chunk_tokens;
  int multiprocessors = 0;
  const cudaError_t status = sentencekv::multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  // A block's queries cost as much as a chunk: where blocks queue, they take several chunks.
  const int64_t at_once = int64_t{sentencekv::kScoreBlocks} * multiprocessors;
  const int64_t each = int64_t{chunks} * a.num_heads * a.num_requests / at_once;
  const int per_block = each < 1 ? 1 : static_cast<int>(each);
  return sentencekv::launch(kernel,
                            dim3((chunks + per_block - 1) / per_block, a.num_heads, a.num_requests),
                            sentencekv::kScoreThreads, sizeof(sentencekv::ScoreShared), stream, a);
}
