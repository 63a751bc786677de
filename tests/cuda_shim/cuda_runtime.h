// Runs a CUDA kernel on the CPU, for the tests: the same source, compiled as C++. The threads of a
// block are fibers that take turns at barriers and warp operations, in a random order; a block's
// shared memory is that of the one thread that runs it, so `thread_local`. Compiled with
// -fsanitize=thread, every read and write of a kernel is reported to runtime.cpp, which ends the
// launch with an error where one is out of bounds, reads what nobody wrote, or races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __syncthreads() cuda_shim::meet_block(__FILE__, __LINE__)
#define __syncwarp() cuda_shim::meet_warp(__FILE__, __LINE__, nullptr, 0)
#define __shfl_sync(mask, value, source) \
  cuda_shim::shuffle(__FILE__, __LINE__, mask, value, [&](int) { return source; })
#define __shfl_xor_sync(mask, value, bits) \
  cuda_shim::shuffle(__FILE__, __LINE__, mask, value, [&](int lane) { return lane ^ (bits); })
#define __shfl_up_sync(mask, value, delta) \
  cuda_shim::shuffle(__FILE__, __LINE__, mask, value, [&](int lane) { return lane - (delta); })
#define __shfl_down_sync(mask, value, delta) \
  cuda_shim::shuffle(__FILE__, __LINE__, mask, value, [&](int lane) { return lane + (delta); })

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace cuda_shim {

// What kernels may touch until `forget`: inputs are only read, outputs not before they are written.
enum class Use { kInput, kOutput, kBoth };
void allow(const char* name, const void* data, size_t count, size_t bytes_each, Use use);
void forget();

template <class T>
void input(const char* name, const T* data, size_t count) {
  allow(name, data, count, sizeof(T), Use::kInput);
}
template <class T>
void output(const char* name, T* data, size_t count) {
  allow(name, data, count, sizeof(T), Use::kOutput);
}
template <class T>
void input_and_output(const char* name, T* data, size_t count) {
  allow(name, data, count, sizeof(T), Use::kBoth);
}

// All threads of the block, or of the warp, wait for each other. `data` of each lane of the warp
// is handed to all: the result is an array of 32 pieces of kPieceBytes.
constexpr size_t kPieceBytes = 24;
void meet_block(const char* file, int line);
const unsigned char* meet_warp(const char* file, int line, const void* data, size_t bytes);
void require_full_mask(uint32_t mask);
unsigned lane();

template <class T, class Source>
T shuffle(const char* file, int line, uint32_t mask, T value, const Source& source) {
  static_assert(sizeof(T) <= kPieceBytes);
  require_full_mask(mask);
  const unsigned char* pieces = meet_warp(file, line, &value, sizeof value);
  const int from = source(static_cast<int>(lane()));
  if (from >= 0 && from < 32) std::memcpy(&value, pieces + from * kPieceBytes, sizeof value);
  return value;
}

// The product of a warp, mma.m16n8k8 in TF32.
void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

cudaError_t run(dim3 grid, dim3 block, void (*thread)(void*), void* argument);

}  // namespace cuda_shim

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "kernel parameters hold 32,764 bytes");
  // The launch itself reads from the host.
  auto thread = [&]() __attribute__((no_sanitize_thread)) { kernel(arguments...); };
  using Thread = decltype(thread);
  const auto call = [](void* argument) __attribute__((no_sanitize_thread)) {
    (*static_cast<Thread*>(argument))();
  };
  return cuda_shim::run(config->gridDim, config->blockDim, call, &thread);
}
