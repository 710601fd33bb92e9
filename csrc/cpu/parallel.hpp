// SPDX-License-Identifier: Apache-2.0
// A dynamic parallel loop.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sentencekv::cpu {

inline int64_t num_threads(int64_t count) {
#ifdef _OPENMP
  return std::max<int64_t>(1, std::min<int64_t>(count, omp_get_max_threads()));
#else
  (void)count;
  return 1;
#endif
}

// body(i) for i in [0, count), on as many threads as the process gives OpenMP. The counter
// is ours, so that of an OpenMP runtime only `GOMP_parallel` is needed: all of them have it.
template <class Body>
void parallel_for(int64_t count, Body body) {
#ifdef _OPENMP
  const int64_t threads = num_threads(count);
  if (threads > 1) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace sentencekv::cpu
