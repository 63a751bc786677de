// Kernels with a fault each, for tests/cuda/test_shim.py: the shim must name it.
#include <cuda_runtime.h>

#include <map>
#include <string>

namespace {

constexpr int kThreads = 64;

__device__ int next_thread() { return (static_cast<int>(threadIdx.x) + 1) % kThreads; }

// Without a fault: shared memory, barriers and every warp operation.
__global__ void sound(const float* in, float* out) {
  __shared__ float values[kThreads], of_warps[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  values[t] = in[t];
  __syncthreads();
  float sum = values[next_thread()];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  const float first = __shfl_sync(0xffffffffu, sum + static_cast<float>(t), 0);
  const float above = __shfl_up_sync(0xffffffffu, first + static_cast<float>(t), 1);
  const float below = __shfl_down_sync(0xffffffffu, above, 1);
  // Lanes of one warp may also meet in shared memory.
  of_warps[t] = below;
  __syncwarp();
  out[t] = of_warps[t / 32 * 32 + (t + 1) % 32];
}

__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[next_thread()];
}

__global__ void write_after_read(const float* in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[next_thread()];
  values[threadIdx.x] = 0;
}

__global__ void warp_barrier_for_a_block(const float* in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = values[next_thread()];
}

__global__ void unwritten_shared(const float* in, float* out) {
  __shared__ float values[kThreads];
  if (threadIdx.x != 5) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void unwritten_output(const float*, float* out) { out[threadIdx.x] += 1; }

__global__ void reads_beyond(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

__global__ void writes_beyond(const float* in, float* out) {
  out[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x];
}

__global__ void index_beyond(const float* in, float* out) {
  __shared__ float values[2][kThreads];
  values[0][threadIdx.x] = values[1][threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[0][threadIdx.x + 1];
}

__global__ void writes_input(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  const_cast<float*>(in)[threadIdx.x] = 0;
}

__global__ void blocks_write_the_same(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void leaves_early(const float* in, float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void lane_is_missing(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x != 40) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void partial_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 1);
}

using Kernel = void (*)(const float*, float*);
#define NAMED(kernel) {#kernel, kernel}
const std::map<std::string, Kernel> kKernels = {
    NAMED(sound),
    NAMED(missing_barrier),
    NAMED(write_after_read),
    NAMED(warp_barrier_for_a_block),
    NAMED(unwritten_shared),
    NAMED(unwritten_output),
    NAMED(reads_beyond),
    NAMED(writes_beyond),
    NAMED(index_beyond),
    NAMED(writes_input),
    NAMED(blocks_write_the_same),
    NAMED(two_barriers),
    NAMED(leaves_early),
    NAMED(lane_is_missing),
    NAMED(partial_mask),
};

}  // namespace

// in and out hold kThreads entries. Returns a cudaError_t.
extern "C" int run(const char* name, int blocks, const float* in, float* out) {
  cuda_shim::input("in", in, kThreads);
  cuda_shim::output("out", out, kThreads);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  const cudaError_t status = cudaLaunchKernelEx(&config, kKernels.at(name), in, out);
  cuda_shim::forget();
  return status;
}

// c (16, 8) += a (16, 8) b (8, 8), row by row, through one product of the tensor cores.
extern "C" int multiply(const float* a, const float* b, float* c) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  cuda_shim::input("a", a, 16 * 8);
  cuda_shim::input("b", b, 8 * 8);
  cuda_shim::input_and_output("c", c, 16 * 8);
  void (*kernel)(const float*, const float*, float*) = [](const float* a, const float* b,
                                                          float* c) {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const uint32_t left[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]),
                              __float_as_uint(a[g * 8 + t + 4]),
                              __float_as_uint(a[(g + 8) * 8 + t + 4])};
    const uint32_t right[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
    float* rows[2] = {c + g * 8 + 2 * t, c + (g + 8) * 8 + 2 * t};
    float sum[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
    cuda_shim::multiply_tf32(sum, left, right);
    for (int e = 0; e < 4; ++e) rows[e / 2][e % 2] = sum[e];
  };
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, a, b, c);
  cuda_shim::forget();
  return status;
}
