// The kernel of apply_update_ and its launch, free of torch: tests/cuda_shim compiles this file
// as C++ and runs it on the CPU.
// Per element 6 operations; 20 bytes in float32 with momentum (reads p, Delta, v; writes p, v):
// bound by memory. Not measured on a GPU yet.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/update_rule.h"

namespace fused_so {

// One tensor: parameters P, updates U, accumulated in A.
template <class P, class U, class A>
struct TensorUpdate {
  P* param;
  const U* update;
  A* buffer;  // null without momentum
  int64_t size;
};

constexpr int kUpdateThreads = 256;
constexpr int kUpdatesPerThread = 8;  // loads in flight; 8 x 256 elements are one block's share
constexpr int64_t kUpdateShare = int64_t{kUpdateThreads} * kUpdatesPerThread;

// Many tensors travel in the launch itself: kernel parameters hold 4 KiB on any GPU, and nearly
// 32 KiB from sm_70 and CUDA 12.1 on. The small table keeps an ordinary launch light.
constexpr int kSmallTable = 96;
constexpr int kLargeTable = 768;

template <class P, class U, class A, int kCapacity>
struct UpdateTable {
  int count;
  int64_t first_block[kCapacity];  // blocks before tensor t
  TensorUpdate<P, U, A> tensors[kCapacity];
};

template <class P, class U, class A, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads)
    apply_update_kernel(const __grid_constant__ UpdateTable<P, U, A, kCapacity> table,
                        const UpdateRule<A> rule, const A* scale) {
  // The last tensor whose first block is not after this one.
  const int64_t block = blockIdx.x;
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const TensorUpdate<P, U, A>& tensor = table.tensors[low];
  const A factor = scale == nullptr ? A(1) : *scale;
  if (factor == A(0)) return;
  const int64_t begin = (block - table.first_block[low]) * kUpdateShare + threadIdx.x;

  // All loads first: stores in between would keep the compiler from overlapping them.
  A param[kUpdatesPerThread], update[kUpdatesPerThread], velocity[kUpdatesPerThread];
#pragma unroll
  for (int u = 0; u < kUpdatesPerThread; ++u) {
    const int64_t i = begin + u * kUpdateThreads;
    if (i < tensor.size) {
      param[u] = static_cast<A>(tensor.param[i]);
      update[u] = static_cast<A>(tensor.update[i]);
      velocity[u] = tensor.buffer == nullptr ? A(0) : tensor.buffer[i];
    }
  }
#pragma unroll
  for (int u = 0; u < kUpdatesPerThread; ++u) {
    const int64_t i = begin + u * kUpdateThreads;
    if (i < tensor.size) {
      // Two calls, not a pointer that may be null: that would put the velocities on the stack.
      if (tensor.buffer == nullptr) {
        tensor.param[i] = static_cast<P>(rule(param[u], update[u], factor));
      } else {
        tensor.param[i] = static_cast<P>(rule(param[u], update[u], factor, &velocity[u]));
        tensor.buffer[i] = velocity[u];
      }
    }
  }
}

// Launches tensors[0 .. count), none of them empty and count <= kCapacity.
template <int kCapacity, class P, class U, class A>
cudaError_t launch_update_table(const TensorUpdate<P, U, A>* tensors, int64_t count,
                                UpdateRule<A> rule, const A* scale, cudaStream_t stream) {
  UpdateTable<P, U, A, kCapacity> table;
  int64_t blocks = 0;
  table.count = static_cast<int>(count);
  for (int64_t t = 0; t < count; ++t) {
    table.tensors[t] = tensors[t];
    table.first_block[t] = blocks;
    blocks += (tensors[t].size + kUpdateShare - 1) / kUpdateShare;
  }
  // A grid has up to 2^31 - 1 blocks, here 4 10^12 elements: more than any memory.
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kUpdateThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, apply_update_kernel<P, U, A, kCapacity>, table, rule, scale);
}

// Updates `count` tensors, none of them empty; one launch up to kLargeTable of them.
template <class P, class U, class A>
cudaError_t launch_apply_update(const TensorUpdate<P, U, A>* tensors, int64_t count,
                                UpdateRule<A> rule, const A* scale, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < count && status == cudaSuccess; first += kLargeTable) {
    const int64_t left = std::min<int64_t>(kLargeTable, count - first);
    status = left <= kSmallTable
                 ? launch_update_table<kSmallTable>(tensors + first, left, rule, scale, stream)
                 : launch_update_table<kLargeTable>(tensors + first, left, rule, scale, stream);
  }
  return status;
}

}  // namespace fused_so
