// Runs a CUDA kernel on the CPU, for the tests: the same source, compiled as C++. A launch is a
// loop over blocks and threads, one after the other, so a kernel must not need its threads to
// meet (no __syncthreads, no shuffles). The threads of a block run in a shuffled order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline int launches = 0;  // for tests that count them

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool one_dimensional = grid.y * grid.z * block.y * block.z == 1;
  if (!one_dimensional || grid.x == 0 || block.x == 0 || block.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "kernel parameters hold 32,764 bytes");
  ++launches;
  gridDim = grid;
  blockDim = block;
  std::mt19937 random(0);
  std::vector<unsigned> order(block.x);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned b = 0; b < grid.x; ++b) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned t : order) {
      blockIdx = dim3(b);
      threadIdx = dim3(t);
      kernel(arguments...);
    }
  }
  return cudaSuccess;
}
