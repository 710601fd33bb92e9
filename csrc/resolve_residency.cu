// SPDX-License-Identifier: Apache-2.0
// C ABI of resolve_residency: one launch for all requests and KV heads of a layer.
#include <sentencekv/resolve_residency.cuh>

using sentencekv::ResolveResidencyArgs;

/// Returns cudaErrorInvalidValue where a request has fewer slots than it may select, or where
/// the slots and the selection exceed a block's shared memory (some 12000 together).
extern "C" cudaError_t sentencekv_resolve_residency(const ResolveResidencyArgs* args,
                                                    cudaStream_t stream) {
  const ResolveResidencyArgs& a = *args;
  if (a.num_slots < a.max_blocks) return cudaErrorInvalidValue;
  const int warp = sentencekv::kWarp;
  int threads = (a.num_slots + warp - 1) / warp * warp;
  if (threads > sentencekv::kMaxResolveThreads) threads = sentencekv::kMaxResolveThreads;
  return sentencekv::launch(sentencekv::resolve_residency_kernel,
                            dim3(a.num_heads, a.num_requests), threads,
                            sentencekv::resolve_shared_bytes(a), stream, a);
}
