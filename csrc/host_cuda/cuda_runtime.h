// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that the kernels use, for a host compiler.
//
// The threads of a block are fibers that change hands at barriers, so kernels stay ordinary CUDA.
// Each warp runs as far ahead as barriers let it, warps and lanes in random order, and shared
// memory starts as noise: a missing barrier or a read of unwritten memory shows as a wrong
// result, a barrier that not all threads reach as an abort. Blocks have whole warps. One host
// thread may run kernels at a time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorHostMemoryNotRegistered = 713
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyDefault };
using cudaStream_t = void*;
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost };
struct cudaPointerAttributes {
  cudaMemoryType type;
  void* devicePointer;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // odd, so that work does not divide evenly
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  *out = {cudaMemoryTypeHost, const_cast<void*>(pointer)};
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorHostMemoryNotRegistered: return "host memory is not pinned";
  }
  return "unknown error";
}

namespace sentencekv {
alignas(16) inline unsigned char shared_memory[48 * 1024];
}

namespace host_cuda {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  bool done = false;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Barrier> warps;
  std::vector<int> exchange;  // [threads]: what each lane shows to its warp
  Barrier all;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  bool moved = false;     // a fiber passed or reached a barrier in this pass over a warp
  bool progress = false;  // the same for the passes over all warps
  std::function<void()> body;
  std::mt19937 random{1};
};

inline Block block;

inline void fiber_main() {
  block.body();
  block.current->done = true;
  block.moved = true;
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  block.moved = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    swapcontext(&block.current->context, &block.scheduler);
  }
  block.moved = true;
}

/// Run a warp until all its lanes wait for another warp or are done; false if all were done.
inline bool run_warp(int warp) {
  std::vector<int> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), warp * kWarp);
  bool running = false;
  do {
    block.moved = false;
    std::shuffle(lanes.begin(), lanes.end(), block.random);
    for (const int t : lanes) {
      Fiber& fiber = *block.fibers[t];
      if (fiber.done) continue;
      running = true;
      block.current = &fiber;
      threadIdx = fiber.index;
      swapcontext(&block.scheduler, &fiber.context);
    }
    block.progress |= block.moved;
  } while (block.moved);
  return running;
}

inline void run_block(int threads, size_t shared_bytes) {
  while (static_cast<int>(block.fibers.size()) < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
  }
  block.all = {threads};
  block.warps.assign(threads / kWarp, Barrier{kWarp});
  block.exchange.assign(threads, 0);
  for (size_t i = 0; i < shared_bytes; ++i) {
    sentencekv::shared_memory[i] = static_cast<unsigned char>(block.random());
  }
  std::vector<int> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *block.fibers[t];
    fiber.index = dim3(t, 0, 0);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running;) {
    running = block.progress = false;
    std::shuffle(warps.begin(), warps.end(), block.random);
    for (const int warp : warps) running |= run_warp(warp);
    if (running && !block.progress) {
      std::fprintf(stderr, "a barrier was not reached by every thread that it waits for\n");
      std::abort();
    }
  }
}

inline void run(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> body) {
  gridDim = grid;
  blockDim = threads;
  block.body = std::move(body);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(static_cast<int>(threads.x), shared_bytes);
    }
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::wait(host_cuda::block.all); }

inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  host_cuda::block.exchange[thread] = value;
  host_cuda::wait(host_cuda::block.warps[warp]);
  const int from = thread % 32 >= distance ? thread - distance : thread;
  const int received = host_cuda::block.exchange[from];
  host_cuda::wait(host_cuda::block.warps[warp]);
  return received;
}

/// What the lane that `from` names, by its own lane number, shows to its warp.
template <class T, class From>
T host_shuffle(T value, From from) {
  static_assert(sizeof(T) == sizeof(int), "lanes exchange 32 bits");
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  std::memcpy(&host_cuda::block.exchange[thread], &value, sizeof(T));
  host_cuda::wait(host_cuda::block.warps[warp]);
  std::memcpy(&value, &host_cuda::block.exchange[warp * 32 + from(thread % 32)], sizeof(T));
  host_cuda::wait(host_cuda::block.warps[warp]);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return host_shuffle(value, [bits](int lane) { return lane ^ bits; });
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return host_shuffle(value, [source](int) { return source & 31; });
}

/// Four bytes out of the eight of x and y, each named by a digit of `selector`.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}

template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}

using std::max;
using std::min;

template <class T>
T atomicAdd(T* pointer, T value) {
  const T before = *pointer;
  *pointer += value;
  return before;
}

template <class T>
T atomicMax(T* pointer, T value) {
  const T before = *pointer;
  *pointer = std::max(before, value);
  return before;
}

template <class T>
T atomicMin(T* pointer, T value) {
  const T before = *pointer;
  *pointer = std::min(before, value);
  return before;
}
