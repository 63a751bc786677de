// Inversion of a symmetric positive definite matrix in one sweep: the tiles.
//
// The Cholesky factor, its inverse and the product L^-T L^-1 are three loops over one triangle;
// here they are one loop (Bientinesi, Gunter, van de Geijn 2008). At block row k
//     A_kk = L L^T,  W = L^-1                        factor
//     P = W [A_k,left | I | A_k,right]               multiply
//     X_ij += P_i^T P_j  in rows i up to the end of k,  -= in rows below it       update
// where the update is all but a vanishing part of the d^3 operations and takes both operands
// from the panel P. The matrix lies row by row: in the lower triangle the inverse so far, and
// below it the rows of L^-1 in the making; in the upper triangle what is still to be factored.
// An entry that is in neither is dead: tiles may write anything into it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace fused_so {

// Rows that `factor` takes at once; a block is padded to a multiple of it with the identity.
constexpr int64_t kBase = 16;
constexpr int64_t kMaxBlock = 64;

template <class T>
struct SweepStep {
  T* x;  // (d, d)
  int64_t d;
  int64_t k0, k1;    // the rows of the block
  int64_t depth;     // k1 - k0, padded
  const T* w;        // (depth, depth), lower triangular
  T* panels;         // P, by panels of columns: [panel][depth][width]
  bool only_factor;  // stop at L^-1 in the lower triangle, without L^-T L^-1
};

// One instruction set's functions. Panels count columns in `multiply`, rows in `update`; the
// panels of a step are independent of each other.
template <class T>
struct SweepTiles {
  int64_t width;  // of a panel
  int64_t (*factor)(T* w, int64_t ld);
  void (*multiply)(const SweepStep<T>& step, int64_t panel);
  void (*update)(const SweepStep<T>& step, int64_t panel);
};

// The bodies of these functions, around a tile of kRows x (2 vectors of kBytes) in registers.
// always_inline lets each be compiled for the instruction set of the function that calls it.
template <class T, int kBytes, int kRows>
struct SweepBody {
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Memory __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer Index __attribute__((vector_size(kBytes)));
  static constexpr int kVectors = 2;
  static constexpr int kLanes = kBytes / sizeof(T);
  static constexpr int64_t kWidth = kVectors * kLanes;
  static_assert(kWidth % kRows == 0 && kBase % kRows == 0);

  // c[r, :] = [c[r, :] +] alpha sum_k a[r, k] b[k, :], with b a panel, row stride kWidth.
  template <bool kAccumulate>
  [[gnu::always_inline]] static inline void product(int64_t depth, const T* a, int64_t a_row,
                                                    int64_t a_k, const T* b, T alpha, T* c,
                                                    int64_t ldc) {
    Vector sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = *(const Memory*)(b + k * kWidth + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const T factor = a[r * a_row + k * a_k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Memory* out = (Memory*)(c + r * ldc + v * kLanes);
        *out = kAccumulate ? *out + alpha * sum[r][v] : alpha * sum[r][v];
      }
    }
  }

  // One panel of P = W [A_k,left | I | A_k,right].
  [[gnu::always_inline]] static inline void multiply(const SweepStep<T>& s, int64_t panel) {
    const int64_t j0 = panel * kWidth;
    const int64_t columns = std::min(kWidth, s.d - j0);
    T* p = s.panels + panel * s.depth * kWidth;
    const int64_t begin = std::max(s.k0, j0), end = std::min(s.k1, j0 + columns);
    if (end - begin < kWidth) {
      alignas(64) T rows[kMaxBlock * kWidth];
      for (int64_t k = 0; k < s.depth; ++k) {
        T* row = rows + k * kWidth;
        if (columns < kWidth || s.k0 + k >= s.k1) std::fill(row, row + kWidth, T(0));
        if (s.k0 + k >= s.k1) continue;
        const T* source = s.x + (s.k0 + k) * s.d + j0;
        if (columns == kWidth) {
          for (int64_t j = 0; j < kWidth; ++j) row[j] = source[j];
        } else {
          for (int64_t j = 0; j < columns; ++j) row[j] = source[j];
        }
      }
      for (int64_t r = 0; r < s.depth; r += kRows) {
        product<false>(r + kRows, s.w + r * s.depth, s.depth, 1, rows, T(1), p + r * kWidth,
                       kWidth);
      }
    }
    for (int64_t k = 0; k < s.depth; ++k) {
      for (int64_t j = begin; j < end; ++j) p[k * kWidth + j - j0] = s.w[k * s.depth + j - s.k0];
    }
  }

  // The rows of one panel's width: X_ij += P_i^T P_j above and in the block row, -= below.
  [[gnu::always_inline]] static inline void update(const SweepStep<T>& s, int64_t panel) {
    const int64_t i0 = panel * kWidth, i1 = std::min(s.d, i0 + kWidth);
    const int64_t panels = (s.d + kWidth - 1) / kWidth, done = (s.k1 + kWidth - 1) / kWidth;
    // What the sums start from: the block row and the block column now hold P.
    for (int64_t i = std::max(i0, s.k0); i < i1; ++i) {
      T* row = s.x + i * s.d;
      if (i >= s.k1) {
        std::fill(row + s.k0, row + s.k1, T(0));
      } else if (!s.only_factor) {
        std::fill(row, row + s.k1, T(0));
      } else {
        for (int64_t j = 0; j < s.k1; ++j) {
          row[j] = s.panels[((j / kWidth) * s.depth + i - s.k0) * kWidth + j % kWidth];
        }
      }
    }
    const T* left = s.panels + panel * s.depth * kWidth;
    for (int64_t q = 0; q < panels; ++q) {
      const T* right = s.panels + q * s.depth * kWidth;
      const int64_t columns = std::min(kWidth, s.d - q * kWidth);
      for (int64_t i = i0; i < i1; i += kRows) {
        const bool below = i >= s.k1;
        if (below ? q >= done && q < panel : q > panel || s.only_factor) continue;
        const T alpha = below ? T(-1) : T(1);
        T* out = s.x + i * s.d + q * kWidth;
        const int64_t rows = std::min<int64_t>(kRows, i1 - i);
        if (columns == kWidth && rows == kRows) {
          product<true>(s.depth, left + i - i0, 1, kWidth, right, alpha, out, s.d);
        } else {
          alignas(64) T edge[kRows * kWidth];
          product<false>(s.depth, left + i - i0, 1, kWidth, right, alpha, edge, kWidth);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < columns; ++j) out[r * s.d + j] += edge[r * kWidth + j];
          }
        }
      }
    }
  }

  // In place, kBase rows: the upper triangle of A in, W = L^-1 with zeros above it out. Returns
  // 0, or the order of the first leading minor that is not positive definite. Entries are picked
  // by selections: a store to a single one would hold up the next load of its vector.
  [[gnu::always_inline]] static inline int64_t factor(T* w, int64_t ld) {
    constexpr int kParts = kBase / kLanes;
    Index lane[kParts];
    for (int64_t j = 0; j < kBase; ++j) lane[j / kLanes][j % kLanes] = j;
    for (int64_t k = 0; k < kBase; ++k) {
      T* row = w + k * ld;
      const T pivot = row[k];
      if (!(pivot > T(0))) return k + 1;
      const T root = std::sqrt(pivot);
      // p = [row k so far | 1 | rest of row k] / sqrt(pivot)
      alignas(64) T p[kBase];
      Vector part[kParts];
      const Integer pick = static_cast<Integer>(k);
      for (int v = 0; v < kParts; ++v) {
        const Vector one = Vector{} + T(1);
        part[v] = (lane[v] == pick ? one : *(const Memory*)(row + v * kLanes)) / root;
        *(Memory*)(p + v * kLanes) = part[v];
        *(Memory*)(row + v * kLanes) = lane[v] <= pick ? part[v] : Vector{};
      }
      // row i -= p_i p, with its column k starting from zero
      for (int64_t i = k + 1; i < kBase; ++i) {
        for (int v = 0; v < kParts; ++v) {
          T* out = w + i * ld + v * kLanes;
          const Vector start = lane[v] == pick ? Vector{} : *(const Memory*)out;
          *(Memory*)out = start - p[i] * part[v];
        }
      }
    }
    return 0;
  }
};

}  // namespace fused_so
