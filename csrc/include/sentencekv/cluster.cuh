// SPDX-License-Identifier: Apache-2.0
// Blocks of threads that see each other's shared memory: thread block clusters, from sm_90 on.
#pragma once

#include "launch.hpp"

namespace sentencekv {

/// The cluster of the calling block: neighbours along x. Without clusters a block is its own.
struct Cluster {
  int size, rank;

  __device__ static Cluster current() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    Cluster cluster;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(cluster.size));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(cluster.rank));
    return cluster;
#elif defined(__CUDACC__)
    return {1, 0};
#else
    return {host_cuda::cluster_size(), host_cuda::cluster_rank()};
#endif
  }

  /// A barrier for all threads of the cluster; what they wrote before it is seen after it.
  __device__ void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
      return;
    }
#elif !defined(__CUDACC__)
    host_cuda::sync_cluster();
#endif
    __syncthreads();
  }

  /// What lies in block `other` where `mine` lies in this one's shared memory.
  template <class T>
  __device__ T* at(T* mine, int other) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    T* theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(other));
    return theirs;
#elif defined(__CUDACC__)
    return mine;
#else
    return host_cuda::shared_at(mine, other);
#endif
  }
};

/// The largest power of two of blocks that share one of `units` of work, so that all run at once,
/// two a multiprocessor.
inline cudaError_t blocks_per_unit(int units, int most, int* count) {
  *count = 1;
#ifndef __CUDACC__
  most = std::min(most, host_cuda::kMaxCluster);
#else
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess || major < 9) return status;
#endif
  int processors = 0;
  const cudaError_t found = multiprocessors(&processors);
  while (*count < most && *count * units <= processors) *count *= 2;
  return found;
}

}  // namespace sentencekv
