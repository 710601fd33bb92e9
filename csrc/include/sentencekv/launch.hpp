// SPDX-License-Identifier: Apache-2.0
// One way to start a kernel under nvcc and under the host emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sentencekv {

constexpr int kWarp = 32;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // a block gets no more without opting in

/// With __umulhi, x / divisor of an x below 2^32 / divisor; of a divisor above 1.
inline uint32_t reciprocal(int divisor) { return 0xffffffffu / static_cast<uint32_t>(divisor) + 1; }

/// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

/// Start `kernel(args)`; errors of the launch itself are returned, not those of its run.
/// `cluster`: blocks along x that form a cluster; more than one from sm_90 on only.
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes,
                   [[maybe_unused]] cudaStream_t stream, const Args& args, int cluster = 1) {
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef __CUDACC__
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, args);
#else
  host_cuda::run(grid, dim3(threads), cluster, shared_bytes, [&] { kernel(args); });
  return cudaSuccess;
#endif
}

/// The block's dynamic shared memory.
__device__ inline unsigned char* shared_of_block() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
#else
  return host_cuda::shared_of_block();
#endif
}

}  // namespace sentencekv
