// SPDX-License-Identifier: Apache-2.0
// C ABI of rank: one launch for all requests and KV heads of a layer.
#include <sentencekv/rank.cuh>

using sentencekv::RankArgs;

/// Returns cudaErrorInvalidValue for groups above 8 or requests of more than 8192 blocks.
extern "C" cudaError_t sentencekv_rank(const RankArgs* args, cudaStream_t stream) {
  const RankArgs& a = *args;
  if (!sentencekv::rank_fits(a)) return cudaErrorInvalidValue;
  int cluster = 1;
  const cudaError_t status = sentencekv::rank_cluster(a, &cluster);
  if (status != cudaSuccess) return status;
  return sentencekv::launch(a.group <= 4 ? sentencekv::rank_kernel<4> : sentencekv::rank_kernel<8>,
                            dim3(a.num_heads * cluster, a.num_requests), sentencekv::kRankThreads,
                            sentencekv::rank_shared_bytes(a), stream, a, cluster);
}
