// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that the kernels use, for a host compiler.
//
// The threads of a block are fibers that change hands at barriers, so kernels stay ordinary CUDA.
// Each warp runs as far ahead as barriers let it, warps and lanes in random order, and shared
// memory starts as noise: a missing barrier or a read of unwritten memory shows as a wrong
// result, a barrier that not all threads reach as an abort. Blocks have whole warps. The blocks of
// a cluster run together, others one after the other. One host thread may run kernels at a time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
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
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
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
alignas(16) inline unsigned char shared_memory[2 * 48 * 1024];  // of a cluster's blocks
}

namespace host_cuda {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;
constexpr int kMaxCluster = sizeof(sentencekv::shared_memory) / kSharedBytes;

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;  // of the first entry; later ones are jumps, which call no kernel
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index, block;
  int number, rank;  // in the cluster: of this thread, and of its block
  bool started = false, done = false;
};

using Words = std::array<uint32_t, 3>;

struct Cluster {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Barrier> warps, blocks;
  Barrier all;
  std::vector<Words> exchange;  // [threads]: what each lane shows to its warp
  jmp_buf scheduler;
  Fiber* current = nullptr;
  bool moved = false;     // a fiber passed or reached a barrier in this pass over a warp
  bool progress = false;  // the same for the passes over all warps
  std::function<void()> body;
  std::mt19937 random{1};
};

inline Cluster cluster;

inline int cluster_size() { return static_cast<int>(cluster.blocks.size()); }
inline int cluster_rank() { return cluster.current->rank; }
inline unsigned char* shared_of_block() {
  return sentencekv::shared_memory + cluster_rank() * kSharedBytes;
}

template <class T>
T* shared_at(T* mine, int rank) {
  const ptrdiff_t blocks = rank - cluster_rank();
  return reinterpret_cast<T*>(reinterpret_cast<char*>(mine) + blocks * static_cast<ptrdiff_t>(kSharedBytes));
}

inline void fiber_main() {
  cluster.body();
  cluster.current->done = true;
  cluster.moved = true;
  _longjmp(cluster.scheduler, 1);
}

/// Go on with a fiber until it waits or is done.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  cluster.current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block;
  if (_setjmp(cluster.scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

[[gnu::noinline]] inline void suspend() {
  if (!_setjmp(cluster.current->place)) _longjmp(cluster.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  cluster.moved = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) suspend();
  cluster.moved = true;
}

/// Run a warp until all its lanes wait for another warp or are done; false if all were done.
inline bool run_warp(int warp) {
  std::vector<int> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), warp * kWarp);
  bool running = false;
  do {
    cluster.moved = false;
    std::shuffle(lanes.begin(), lanes.end(), cluster.random);
    for (const int t : lanes) {
      Fiber& fiber = *cluster.fibers[t];
      if (fiber.done) continue;
      running = true;
      resume(fiber);
    }
    cluster.progress |= cluster.moved;
  } while (cluster.moved);
  return running;
}

inline void run_cluster(dim3 first, int threads, int size, size_t shared_bytes) {
  const int all = threads * size;
  while (static_cast<int>(cluster.fibers.size()) < all) {
    cluster.fibers.push_back(std::make_unique<Fiber>());
  }
  cluster.all = {all};
  cluster.blocks.assign(size, Barrier{threads});
  cluster.warps.assign(all / kWarp, Barrier{kWarp});
  cluster.exchange.assign(all, Words{});
  for (int rank = 0; rank < size; ++rank) {
    unsigned char* shared = sentencekv::shared_memory + rank * kSharedBytes;
    for (size_t i = 0; i < shared_bytes; ++i) shared[i] = static_cast<unsigned char>(cluster.random());
  }
  std::vector<int> warps(all / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  for (int t = 0; t < all; ++t) {
    Fiber& fiber = *cluster.fibers[t];
    fiber.index = dim3(t % threads, 0, 0);
    fiber.rank = t / threads;
    fiber.number = t;
    fiber.block = dim3(first.x + fiber.rank, first.y, first.z);
    fiber.started = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running;) {
    running = cluster.progress = false;
    std::shuffle(warps.begin(), warps.end(), cluster.random);
    for (const int warp : warps) running |= run_warp(warp);
    if (running && !cluster.progress) {
      std::fprintf(stderr, "a barrier was not reached by every thread that it waits for\n");
      std::abort();
    }
  }
}

inline void run(dim3 grid, dim3 threads, int size, size_t shared_bytes, std::function<void()> body) {
  gridDim = grid;
  blockDim = threads;
  cluster.body = std::move(body);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += size) {
        run_cluster(dim3(x, y, z), static_cast<int>(threads.x), size, shared_bytes);
      }
    }
  }
}

inline void sync_cluster() { wait(cluster.all); }

}  // namespace host_cuda

inline void __syncthreads() {
  host_cuda::wait(host_cuda::cluster.blocks[host_cuda::cluster_rank()]);
}

/// Show words to the warp, and `read(words of all lanes)`.
template <class Read>
void host_warp_exchange(const host_cuda::Words& words, Read read) {
  auto& cluster = host_cuda::cluster;
  const int thread = cluster.current->number, warp = thread / 32;
  cluster.exchange[thread] = words;
  host_cuda::wait(cluster.warps[warp]);
  read(cluster.exchange.data() + warp * 32);
  host_cuda::wait(cluster.warps[warp]);
}

/// What the lane that `from` names, by its own lane number, shows to its warp.
template <class T, class From>
T host_shuffle(T value, From from) {
  static_assert(sizeof(T) <= sizeof(host_cuda::Words), "what a lane shows");
  host_cuda::Words words{};
  std::memcpy(words.data(), &value, sizeof(T));
  host_warp_exchange(words, [&](const host_cuda::Words* shown) {
    std::memcpy(&value, shown[from(static_cast<int>(threadIdx.x % 32))].data(), sizeof(T));
  });
  return value;
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
  return host_shuffle(value, [=](int lane) { return lane >= distance ? lane - distance : lane; });
}

inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }

/// Rounded down.
inline float __fadd_rd(float x, float y) {
  const float near = x + y;
  const double rest = x - (static_cast<double>(near) - y);  // both differences are exact
  return rest < 0 ? std::nextafterf(near, -INFINITY) : near;
}

/// Truncated; 0 for NaN, and the nearest integer for what no integer is near.
inline int __float2int_rz(float x) {
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  return x <= -2147483648.0f ? INT32_MIN : static_cast<int>(x);
}

/// `sum` plus the products of four signed bytes each.
inline int __dp4a(int x, int y, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(x >> 8 * i) * static_cast<int8_t>(y >> 8 * i);
  }
  return sum;
}

inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}

/// Bit i: the predicate of lane i.
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned bits = 0;
  host_warp_exchange({predicate != 0}, [&](const host_cuda::Words* shown) {
    for (int lane = 0; lane < 32; ++lane) bits |= shown[lane][0] << lane;
  });
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }

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
