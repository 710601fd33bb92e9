// SPDX-License-Identifier: Apache-2.0
// C ABI of score_tokens: one launch for all requests and KV heads of a layer.
#include <sentencekv/score_tokens.cuh>

#include <algorithm>

using sentencekv::ScoreTokensArgs;

namespace {

struct ScoreKernel {
  void (*start)(ScoreTokensArgs);
  int blocks;  // that a multiprocessor holds
};

template <int kSets, int kPer, int kSteps>
constexpr ScoreKernel kKernel = {sentencekv::score_tokens_kernel<kSets, kPer, kSteps>,
                                 sentencekv::kScoreBlocks<kSets, kPer, kSteps>};

template <int kSets>
ScoreKernel kernel_of(const ScoreTokensArgs& a) {
  const bool one_step = a.num_byte_rows <= sentencekv::kStepBytes;
  if (a.query == nullptr) return one_step ? kKernel<kSets, 0, 1> : kKernel<kSets, 0, 2>;
  if (!one_step) return kKernel<kSets, 8, 2>;
  return a.num_byte_rows == sentencekv::kStepBytes ? kKernel<kSets, 4, 1> : kKernel<kSets, 2, 1>;
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
  const ScoreKernel kernel = a.group <= sentencekv::kSetHeads ? kernel_of<1>(a) : kernel_of<2>(a);
  a.granules_per_page = a.block_size / sentencekv::kGranule;
  a.page_factor = sentencekv::reciprocal(a.granules_per_page);
  const int chunks = (a.max_pages * a.block_size + sentencekv::kChunkTokens - 1) / sentencekv::kChunkTokens;
  int multiprocessors = 0;
  const cudaError_t status = sentencekv::multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  // A block's queries cost as much as a chunk: rather than queue, blocks take several chunks.
  const int at_once = kernel.blocks * multiprocessors / std::max(1, a.num_heads * a.num_requests);
  const int blocks = std::min(chunks, std::max(1, at_once));
  return sentencekv::launch(kernel.start, dim3(blocks, a.num_heads, a.num_requests),
                            sentencekv::kScoreThreads, sizeof(sentencekv::ScoreShared), stream, a);
}
