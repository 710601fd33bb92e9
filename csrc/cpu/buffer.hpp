// SPDX-License-Identifier: Apache-2.0
// Scratch memory that is kept between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace sentencekv::cpu {

// Grows geometrically, never shrinks, aligned to a cache line. Growing drops the content.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* reserve(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = count > 2 * capacity_ ? count : 2 * capacity_;
      const auto bytes = static_cast<std::size_t>(capacity_) * sizeof(T);
      data_ = static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  T* data() { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace sentencekv::cpu
