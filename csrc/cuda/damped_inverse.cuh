// The kernels of damped_inverse and their launches, free of torch: tests/cuda_shim compiles this
// file as C++ and runs it on the CPU.
//
// The Cholesky factor, its inverse and the product L^-T L^-1 in one sweep over the lower triangle
// X, in place (common/spd_sweep.h has the same on the CPU). At block row k, with X_k the entries
// of X in that row and, transposed, in that column:
//     X_kk = L L^T,  W = L^-1                                 factor
//     P = W [X_k,left | I | X_k,right]                        panel
//     X_ij = +-P_i^T P_j + (0 if i or j is k, else X_ij)      update
// with + in rows up to the end of k and - below. X then holds the inverse so far in rows and
// columns up to k, what is still to be factored below and right of k, and rows of -A_ik A_kk^-1 in
// between. d^3 operations in all. Up to d = 128 the blocks are single rows and X lies in the
// registers of one block of threads; beyond, a block has 64 rows, and every step two launches.
// Every entry is computed by one thread, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/tile_product.cuh"

namespace fused_so {

constexpr int kLargestSmall = 128;

template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// A batch of matrices, beside its input.
template <class T>
struct DampedInverse {
  const T* damping;  // (batch)
  T* inverse;        // (batch, d, d)
  int32_t* info;     // (batch)
  T* panels;         // panel_entries(batch, d), and
  int32_t* orders;   // (batch); both null up to kLargestSmall
  int64_t batch, d;

  __host__ __device__ int64_t steps() const { return (d + kTile - 1) / kTile; }
  __host__ __device__ int64_t padded() const { return steps() * kTile; }

  // Of matrix m: P (64, padded), and right of it W (64, 64), which the step before has made.
  __host__ __device__ int64_t panel_ld() const { return padded() + kTile; }
  __device__ T* panel(int64_t m) const { return panels + m * kTile * panel_ld(); }
  __device__ T* w(int64_t m) const { return panel(m) + padded(); }

  // What is known of the leading minors before step k updates X: in two places by turns, so that
  // no launch writes what it reads. The last one is info.
  __device__ int32_t& order(int64_t k, int64_t m) const {
    return ((steps() - 1 - k) % 2 == 0 ? info : orders)[m];
  }
};

// Entries of the workspace: 64 rows of d columns and some more for each large matrix.
inline int64_t panel_entries(int64_t batch, int64_t d) {
  const DampedInverse<float> sizes{nullptr, nullptr, nullptr, nullptr, nullptr, batch, d};
  return d <= kLargestSmall ? 0 : batch * kTile * sizes.panel_ld();
}

// The sweep by single rows. Of a matrix of up to kSize rows, thread (y, x) of kY x kX holds the
// entries in rows y + kY r and columns x + kX c, without the tiles (r, c) above the diagonal.
// A row takes a barrier, a division and kSize^2 multiply-adds, half of them in vain on average.
template <class T, int kY, int kX, int kSize>
struct RegisterSweep {
  static_assert(kX % kY == 0 && kSize % kX == 0);
  static constexpr int kRows = kSize / kY, kColumns = kSize / kX;

  // The updates of kY rows are summed apart: fewer roundings at the size of X.
  T entries[kRows][kColumns], updates[kRows][kColumns];

  __device__ static constexpr bool in_triangle(int r, int c) { return kY * (r + 1) > kX * c; }
  __device__ static int y() { return threadIdx.x / kX; }
  __device__ static int x() { return threadIdx.x % kX; }

  // This thread's entries of the lower triangle are body(i, j); what shares a tile with them is 0.
  template <class Body>
  __device__ void load(const Body& body) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int i = y() + kY * r, j = x() + kX * c;
        entries[r][c] = j <= i ? body(i, j) : T(0);
        updates[r][c] = T(0);
      }
    }
  }
  // body(i, j, entry) for this thread's entries of the lower triangle.
  template <class Body>
  __device__ void store(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int i = y() + kY * r, j = x() + kX * c;
        if (in_triangle(r, c) && j <= i) body(i, j, entries[r][c]);
      }
    }
  }

  // Rows 0 .. n become the inverse or, with kOnlyFactor, W = L^-1. Returns, in all threads, 0 or
  // the order of the first leading minor that is not positive definite.
  template <bool kOnlyFactor>
  __device__ int run(int n, T (&lines)[2][kSize]) {
#pragma unroll
    for (int r_k = 0; r_k < kRows; ++r_k) {
      const int c_k = kY * r_k / kX;
#pragma unroll 1
      for (int y_k = 0; y_k < kY; ++y_k) {
        const int k = kY * r_k + y_k, x_k = k % kX;
        if (k >= n) break;
        // Two lines by turns, so that one barrier is enough.
        T(&line)[kSize] = lines[k % 2];
        publish(k, r_k, y_k, c_k, x_k, line);
        __syncthreads();
        const T pivot = line[k];
        if (!(pivot > T(0))) return k + 1;
        eliminate<kOnlyFactor>(pivot, r_k, y_k, c_k, x_k, line);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          entries[r][c] += updates[r][c];
          updates[r][c] = T(0);
        }
      }
    }
    return 0;
  }

 private:
  // line = row k up to the diagonal, then column k
  __device__ __forceinline__ void publish(int k, int r_k, int y_k, int c_k, int x_k,
                                          T (&line)[kSize]) const {
    if (y() == y_k) {
#pragma unroll
      for (int c = 0; c <= c_k; ++c) {
        const int j = x() + kX * c;
        if (j <= k) line[j] = entries[r_k][c] + updates[r_k][c];
      }
    }
    if (x() == x_k) {
#pragma unroll
      for (int r = r_k; r < kRows; ++r) {
        const int i = y() + kY * r;
        if (i > k) line[i] = entries[r][c_k] + updates[r][c_k];
      }
    }
  }

  // With q the line, but q_k = 1: X_ij = +-q_i q_j / pivot + (0 if i or j is k, else X_ij). That
  // is the update with P = q / sqrt(pivot), rounded less often.
  template <bool kOnlyFactor>
  __device__ __forceinline__ void eliminate(T pivot, int r_k, int y_k, int c_k, int x_k,
                                            const T (&line)[kSize]) {
    const T reciprocal = T(1) / pivot;
    T q[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      q[c] = c == c_k && x() == x_k ? T(1) : line[x() + kX * c];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool above = r < r_k || (r == r_k && y() < y_k), row_k = r == r_k && y() == y_k;
      if (kOnlyFactor && r < r_k) continue;
      const T scaled = reciprocal * line[y() + kY * r];
      const T factor = row_k ? reciprocal : above ? scaled : -scaled;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (!in_triangle(r, c)) continue;
        T& entry = entries[r][c];
        T& update = updates[r][c];
        if (row_k || (c == c_k && x() == x_k)) entry = update = T(0);
        // Row k of W is P; it is not summed.
        if (!kOnlyFactor) {
          update += factor * q[c];
        } else if (row_k) {
          entry = q[c] / std::sqrt(pivot);
        } else if (!above) {
          update += factor * q[c];
        }
      }
    }
  }
};

// One block a matrix, everything in registers. d^3 operations, and 6 d^2 bytes in float32 (reads
// half of A, writes the inverse); bound by the latency of d barriers and divisions. Shared memory:
// two rows. Not measured on a GPU yet.
template <class S, class T, int kY, int kX, int kSize>
__global__ void __launch_bounds__(kY* kX)
    invert_small_kernel(const S* all, const __grid_constant__ DampedInverse<T> p) {
  __shared__ T lines[2][kSize];
  const int d = static_cast<int>(p.d);
  const int64_t m = blockIdx.x;
  const S* a = all + m * d * d;
  T* inverse = p.inverse + m * d * d;

  RegisterSweep<T, kY, kX, kSize> sweep;
  sweep.load([&](int i, int j) {
    if (i >= d) return T(0);
    const T entry = static_cast<T>(a[i * d + j]);
    return i == j ? entry + p.damping[m] : entry;
  });
  const int order = sweep.template run<false>(d, lines);
  if (threadIdx.x == 0) p.info[m] = order;
  sweep.store([&](int i, int j, T entry) {
    if (i >= d) return;
    inverse[i * d + j] = inverse[j * d + i] = order == 0 ? entry : kNan<T>;
  });
}

// Of the lower triangle's tiles, counted row by row.
__host__ __device__ inline int64_t tiles_before_row(int64_t row) { return row * (row + 1) / 2; }

struct TileIndex {
  int64_t row, column;

  // row (row + 1) / 2 <= t, solved for row; the root may be off by one.
  __device__ explicit TileIndex(int64_t t)
      : row(static_cast<int64_t>((std::sqrt(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) / 2.0f)) {
    if (tiles_before_row(row) > t) --row;
    if (tiles_before_row(row + 1) <= t) ++row;
    column = t - tiles_before_row(row);
  }
};

// W of block k, which this block of threads has just finished, and order(k).
template <class T>
__device__ void factor_block(const DampedInverse<T>& p, int64_t m, int64_t k) {
  __shared__ T lines[2][kTile];
  const int64_t k0 = k * kTile;
  const int rows = static_cast<int>(p.d - k0 < kTile ? p.d - k0 : kTile);
  const T* block = p.inverse + (m * p.d + k0) * p.d + k0;

  __syncthreads();
  // Padded with the identity.
  RegisterSweep<T, 16, 16, kTile> sweep;
  sweep.load([&](int i, int j) { return i < rows ? block[i * p.d + j] : T(i == j); });
  const int order = sweep.template run<true>(rows, lines);
  if (threadIdx.x == 0) p.order(k, m) = order == 0 ? 0 : static_cast<int32_t>(k0) + order;
  if (order != 0) return;
  T* w = p.w(m);
  sweep.store([&](int i, int j, T entry) {
    w[i * p.panel_ld() + j] = entry;
    if (j < i) w[j * p.panel_ld() + i] = T(0);
  });
}

// X = A + damping I in the lower triangle, a tile a block of threads, and W of the first block.
// 4 d^2 bytes in float32 (reads half of A, writes half of X): bound by memory. Not measured on a
// GPU yet.
template <class S, class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    begin_kernel(const S* all, const __grid_constant__ DampedInverse<T> p) {
  const unsigned batch = static_cast<unsigned>(p.batch);
  const int64_t m = blockIdx.x % batch, t = blockIdx.x / batch;
  const TileIndex tile(t);
  const S* a = all + m * p.d * p.d;
  T* x = p.inverse + m * p.d * p.d;
  for (int e = threadIdx.x; e < kTile * kTile; e += kTileThreads) {
    const int64_t i = tile.row * kTile + e / kTile, j = tile.column * kTile + e % kTile;
    if (i < p.d && j <= i) {
      const T entry = static_cast<T>(a[i * p.d + j]);
      x[i * p.d + j] = i == j ? entry + p.damping[m] : entry;
    }
  }
  if (t == 0) factor_block(p, m, 0);
}

// P = W [X_k,left | I | X_k,right], 64 columns a block of threads; zeros pad it. 128^2 d
// operations; reads and writes 64 d entries. Not measured on a GPU yet.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    panel_kernel(const __grid_constant__ DampedInverse<T> p, const int64_t k) {
  __shared__ Chunk<T> left, right;
  const unsigned batch = static_cast<unsigned>(p.batch);
  const int64_t m = blockIdx.x % batch, column = blockIdx.x / batch;
  if (p.order(k, m) != 0) return;
  const T* w = p.w(m);
  T* panel = p.panel(m) + column * kTile;
  if (column == k) {
    for (int e = threadIdx.x; e < kTile * kTile; e += kTileThreads) {
      const int64_t entry = e / kTile * p.panel_ld() + e % kTile;
      panel[entry] = w[entry];
    }
    return;
  }
  const T* x = p.inverse + m * p.d * p.d;
  const int64_t k0 = k * kTile, j0 = column * kTile;
  TileProduct<T> product;
  for (int depth = 0; depth < kTile; depth += kChunk<T>) {
    const int64_t i0 = k0 + depth;
    load_chunk<true>(left, w + depth, p.panel_ld(), kTile, kTile);
    if (column < k) {
      load_chunk<false>(right, x + i0 * p.d + j0, p.d, p.d - i0, kTile);
    } else {
      load_chunk<true>(right, x + j0 * p.d + i0, p.d, kTile, p.d - j0);
    }
    __syncthreads();
    product.add(left, right);
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < kTileEntries; ++e) {
    panel[product.row(e) * p.panel_ld() + product.column(e)] = product.sum[e];
  }
}

// X_ij = +-P_i^T P_j + (0 if i or j is k, else X_ij), a tile a block of threads. The first tile is
// the next diagonal block, whose W is made here while the others run. The last step mirrors.
// 64 d^2 operations and, in float32, 4 d^2 bytes (reads and writes half of X): bound by memory
// where X is larger than the cache. Not measured on a GPU yet.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    update_kernel(const __grid_constant__ DampedInverse<T> p, const int64_t k) {
  __shared__ Chunk<T> left, right;
  const unsigned batch = static_cast<unsigned>(p.batch);
  const int64_t m = blockIdx.x % batch, t = blockIdx.x / batch;
  const bool last = k + 1 == p.steps();
  const int64_t next = last ? 0 : tiles_before_row(k + 1) + k + 1;
  const TileIndex tile(t == 0 ? next : t == next ? 0 : t);
  const int32_t order = p.order(k, m);
  if (order != 0 && !last) {
    if (t == 0 && threadIdx.x == 0) p.order(k + 1, m) = order;
    return;
  }

  TileProduct<T> product;
  if (order == 0) {
    const T* panel = p.panel(m);
    for (int depth = 0; depth < kTile; depth += kChunk<T>) {
      const T* rows = panel + depth * p.panel_ld();
      load_chunk<false>(left, rows + tile.row * kTile, p.panel_ld(), kTile, kTile);
      load_chunk<false>(right, rows + tile.column * kTile, p.panel_ld(), kTile, kTile);
      __syncthreads();
      product.add(left, right);
      __syncthreads();
    }
  }

  T* x = p.inverse + m * p.d * p.d;
  const bool from_zero = tile.row == k || tile.column == k, below = tile.row > k;
  const int64_t i0 = tile.row * kTile, j0 = tile.column * kTile;
  // All loads first: stores in between would keep the compiler from overlapping them.
#pragma unroll
  for (int e = 0; e < kTileEntries; ++e) {
    const int64_t i = i0 + product.row(e), j = j0 + product.column(e);
    const T start = i < p.d && j <= i && !from_zero ? x[i * p.d + j] : T(0);
    product.sum[e] = below ? start - product.sum[e] : start + product.sum[e];
  }
#pragma unroll
  for (int e = 0; e < kTileEntries; ++e) {
    const int64_t i = i0 + product.row(e), j = j0 + product.column(e);
    if (i < p.d && j <= i) {
      const T entry = order == 0 ? product.sum[e] : kNan<T>;
      x[i * p.d + j] = entry;
      if (last) x[j * p.d + i] = entry;
    }
  }
  if (t == 0 && !last) factor_block(p, m, k + 1);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int kY, int kX, int kSize, class S, class T>
cudaError_t launch_invert_small(const S* a, const DampedInverse<T>& p, cudaStream_t stream) {
  return launch(invert_small_kernel<S, T, kY, kX, kSize>, p.batch, kY * kX, stream, a, p);
}

// a (batch, d, d), neither of them 0, of any floating type S; sums are in T. One launch up to
// d = 128, a warp a matrix up to 32; beyond, 1 + 2 ceil(d / 64). 128 is the most that lies in the
// registers of a block of 256 threads in float64; where the change of method pays is not measured
// yet.
template <class S, class T>
cudaError_t launch_damped_inverse(const S* a, const DampedInverse<T>& p, cudaStream_t stream) {
  if (p.d <= 16) return launch_invert_small<4, 8, 16>(a, p, stream);
  if (p.d <= 32) return launch_invert_small<4, 8, 32>(a, p, stream);
  if (p.d <= 64) return launch_invert_small<16, 16, 64>(a, p, stream);
  if (p.d <= kLargestSmall) return launch_invert_small<16, 16, kLargestSmall>(a, p, stream);

  const int64_t tiles = tiles_before_row(p.steps());
  cudaError_t status = launch(begin_kernel<S, T>, tiles * p.batch, kTileThreads, stream, a, p);
  for (int64_t k = 0; k < p.steps() && status == cudaSuccess; ++k) {
    status = launch(panel_kernel<T>, p.steps() * p.batch, kTileThreads, stream, p, k);
    if (status != cudaSuccess) break;
    status = launch(update_kernel<T>, tiles * p.batch, kTileThreads, stream, p, k);
  }
  return status;
}

}  // namespace fused_so
