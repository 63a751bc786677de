// Sums of products of tiles in shared memory, by a block of 256 threads: C += A^T B with A and B
// (depth, 64) and C (64, 64), at the accuracy of T. float runs on the tensor cores.
// 2 x 64^2 operations for 2 x 64 entries read. Not measured on a GPU yet.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fused_so {

constexpr int kTile = 64;
constexpr int kTileThreads = 256;
constexpr int kTileEntries = kTile * kTile / kTileThreads;  // of C, for a thread
// Columns of a row in shared memory: 8 more, so that 4 rows of 8 entries lie in different banks.
constexpr int kTileRow = kTile + 8;

template <class T>
constexpr int kChunk = 128 / sizeof(T);  // rows of A and of B that are in shared memory at once

template <class T>
using Chunk = T[kChunk<T>][kTileRow];

// chunk[k, j] = source[k, j], or source[j, k] if transposed, for k < rows and j < columns; else 0.
template <bool kTransposed, class T>
__device__ void load_chunk(Chunk<T>& chunk, const T* source, int64_t ld, int64_t rows,
                           int64_t columns) {
#pragma unroll
  for (int e = threadIdx.x; e < kChunk<T> * kTile; e += kTileThreads) {
    // Neighboring threads read neighboring addresses, transposed 8 of them: a warp then writes to
    // as many banks as it can.
    const int k = kTransposed ? e % 8 + e / (8 * kTile) * 8 : e / kTile;
    const int j = kTransposed ? e / 8 % kTile : e % kTile;
    const bool inside = k < rows && j < columns;
    chunk[k][j] = inside ? source[kTransposed ? j * ld + k : k * ld + j] : T(0);
  }
}

// On the ordinary units. A thread has the entries of C in rows y + 16 r and columns x + 16 c.
template <class T>
struct PlainProduct {
  T sum[kTileEntries] = {};

  __device__ static int row(int e) { return threadIdx.x / 16 + 16 * (e / 4); }
  __device__ static int column(int e) { return threadIdx.x % 16 + 16 * (e % 4); }

  __device__ void add(const Chunk<T>& a, const Chunk<T>& b) {
#pragma unroll 4
    for (int k = 0; k < kChunk<T>; ++k) {
      T left[4], right[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) left[r] = a[k][row(4 * r)];
#pragma unroll
      for (int c = 0; c < 4; ++c) right[c] = b[k][column(c)];
#pragma unroll
      for (int e = 0; e < kTileEntries; ++e) sum[e] += left[e / 4] * right[e % 4];
    }
  }
};

// c (16, 8) += a (16, 8) b (8, 8), a product of the whole warp. With g = lane / 4 and t = lane % 4
// a lane holds a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]; b[t, g], b[t + 4, g]; and
// c[g, 2t], c[g, 2t + 1], c[g + 8, 2t], c[g + 8, 2t + 1] (PTX ISA, mma.m16n8k8).
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_shim::multiply_tf32(c, a, b);
#endif
}

// kCount floats of a lane as big + small. The tensor cores read 11 significant bits of an operand:
// big is rounded to them; small, of either sign, has at most one more, which they cut off. A NaN
// that rounding destroys is still in small.
template <int kCount>
struct SplitTf32 {
  uint32_t big[kCount], small[kCount];

  __device__ void set(int i, float x) {
    big[i] = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    small[i] = __float_as_uint(x - __uint_as_float(big[i]));
  }
};

// On the tensor cores. 2 x 4 warps have 32 rows and 16 columns of C each: 2 x 2 products.
struct TensorCoreProduct {
  float sum[kTileEntries] = {};

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int first_row() { return threadIdx.x / 128 * 32; }
  __device__ static int first_column() { return threadIdx.x / 32 % 4 * 16; }
  __device__ static int row(int e) {
    return first_row() + 16 * (e / 8) + lane() / 4 + 8 * (e / 2 % 2);
  }
  __device__ static int column(int e) {
    return first_column() + 8 * (e / 4 % 2) + 2 * (lane() % 4) + e % 2;
  }

  __device__ void add(const Chunk<float>& a, const Chunk<float>& b) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int k = 0; k < kChunk<float>; k += 8) {
      SplitTf32<4> left[2];
      SplitTf32<2> right[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int i = first_row() + 16 * n + g, j = first_column() + 8 * n + g;
        left[n].set(0, a[k + t][i]);
        left[n].set(1, a[k + t][i + 8]);
        left[n].set(2, a[k + t + 4][i]);
        left[n].set(3, a[k + t + 4][i + 8]);
        right[n].set(0, b[k + t][j]);
        right[n].set(1, b[k + t + 4][j]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const SplitTf32<4>& l = left[n / 2];
        const SplitTf32<2>& r = right[n % 2];
        // a b = small big + big small + big big, without the 2^-22 of small small. Summed over
        // k by ordinary additions: the tensor cores' own cut off instead of rounding.
        float part[4] = {};
        multiply_tf32(part, l.small, r.big);
        multiply_tf32(part, l.big, r.small);
        multiply_tf32(part, l.big, r.big);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[4 * n + e] += part[e];
      }
    }
  }
};

template <class T>
using TileProduct =
    std::conditional_t<std::is_same_v<T, float>, TensorCoreProduct, PlainProduct<T>>;

}  // namespace fused_so
