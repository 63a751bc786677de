// Memory that a thread keeps between calls, so that no kernel allocates inside a loop.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)  // by gcc
#define FUSED_SO_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)  // by clang
#define FUSED_SO_ASAN
#endif
#endif
#if defined(FUSED_SO_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace fused_so {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` elements, aligned to a cache line; their old contents are lost.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      STD_TORCH_CHECK(data_ != nullptr, "fused_so: cannot allocate ", bytes, " bytes of scratch");
      size_ = bytes;
    }
#if defined(FUSED_SO_ASAN)
    // What an earlier call asked for beyond these is not this one's.
    __asan_unpoison_memory_region(data_, size_);
    const size_t asked = static_cast<size_t>(count) * sizeof(T);
    __asan_poison_memory_region(static_cast<char*>(data_) + asked, size_ - asked);
#endif
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fused_so
