// SPDX-License-Identifier: Apache-2.0
// C ABI of score_tokens: one launch for all requests and KV heads of a layer.
#include <sentencekv/score_tokens.cuh>

using sentencekv::ScoreTokensArgs;

/// Returns cudaErrorInvalidValue for groups above 8, more than 256 channels, or pages that are no
/// multiple of 16 tokens.
extern "C" cudaError_t sentencekv_score_tokens(const ScoreTokensArgs* args, cudaStream_t stream) {
  const ScoreTokensArgs& a = *args;
  if (a.group > sentencekv::kMaxGroup || a.num_byte_rows > sentencekv::kMaxByteRows ||
      a.block_size % sentencekv::kGranule != 0) {
    return cudaErrorInvalidValue;
  }
  const bool two_sets = a.group > sentencekv::kSetHeads;
  const bool two_steps = a.num_byte_rows > sentencekv::kStepBytes;
  const auto kernel = two_sets ? (two_steps ? sentencekv::score_tokens_kernel<2, 2>
                                            : sentencekv::score_tokens_kernel<2, 1>)
                               : (two_steps ? sentencekv::score_tokens_kernel<1, 2>
                                            : sentencekv::score_tokens_kernel<1, 1>);
  return sentencekv::launch(kernel, dim3(a.num_chunks, a.num_requests * a.num_heads),
                            sentencekv::kScoreThreads, sentencekv::score_shared_bytes(a), stream, a);
}
