// Inversion of a symmetric positive definite matrix in one sweep: the panels of one step.
//
// The Cholesky factor, its inverse and the product L^-T L^-1 are three loops over one triangle;
// here they are one loop (Bientinesi, Gunter, van de Geijn 2008). At block row k
//     A_kk = L L^T,  W = L^-1                        factor, of the micro-kernel
//     P = W [A_k,left | I | A_k,right]               multiply_panel
//     X_ij += P_i^T P_j  in rows i up to the end of k,  -= in rows below it       update_panel
// where the update is all but a vanishing part of the d^3 operations and takes both operands
// from the panels of P. The matrix lies row by row: in the lower triangle the inverse so far, and
// below it the rows of L^-1 in the making; in the upper triangle what is still to be factored.
// An entry that is in neither is dead: tiles may write anything into it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm.h"
#include "common/microkernel.h"

namespace fused_so {

// More rows are in no block.
constexpr int64_t kMaxBlock = 64;

// Panels are nr wide; those of a step are independent of each other.
template <class T>
struct SweepStep {
  const Tiles<T>& tiles;
  T* x;  // (d, d)
  int64_t d;
  int64_t k0, k1;    // the rows of the block
  int64_t depth;     // k1 - k0, padded to a multiple of kFactorRows with the identity
  const T* wt;       // W^T (depth, depth), upper triangular
  T* panels;         // P, by panels of columns: [panel][depth][nr]
  bool only_factor;  // stop at L^-1 in the lower triangle, without L^-T L^-1

  T* panel(int64_t index) const { return panels + index * depth * tiles.nr; }
};

// One panel of P.
template <class T>
void multiply_panel(const SweepStep<T>& s, int64_t panel) {
  const int64_t width = s.tiles.nr, j0 = panel * width, columns = std::min(width, s.d - j0);
  const int64_t begin = std::max(s.k0, j0), end = std::min(s.k1, j0 + columns);
  T* const p = s.panel(panel);
  if (end - begin < width) {
    alignas(64) T rows[kMaxBlock * kMaxLanes];
    for (int64_t k = 0; k < s.depth; ++k) {
      const int64_t count = s.k0 + k < s.k1 ? columns : 0;
      T* const row = rows + k * width;
      if (count > 0) std::copy_n(s.x + (s.k0 + k) * s.d + j0, count, row);
      std::fill(row + count, row + width, T(0));
    }
    const int64_t step = gemm_detail::even_part(s.depth, s.tiles.mr, s.tiles.row_step);
    for (int64_t r = 0; r < s.depth; r += step) {
      const int64_t count = std::min(step, s.depth - r);
      // W is lower triangular.
      gemm_detail::multiply_tile(s.tiles, r + count, s.wt + r, s.depth, rows, T(1), T(0),
                                 gemm_detail::Target<T>{p + r * width, width}, count, width);
    }
  }
  for (int64_t k = 0; k < s.depth; ++k) {
    for (int64_t j = begin; j < end; ++j) p[k * width + j - j0] = s.wt[(j - s.k0) * s.depth + k];
  }
}

// X_ij += P_i^T P_j or, if the rows are below the block, -=; for rows of one panel.
template <class T>
void update_rows(const SweepStep<T>& s, int64_t panel, int64_t first, int64_t last) {
  if (first >= last) return;
  const bool below = first >= s.k1;
  const int64_t width = s.tiles.nr;
  const int64_t panels = gemm_detail::divide_up(s.d, width);
  const int64_t done = gemm_detail::divide_up(s.k1, width);
  const int64_t step = gemm_detail::even_part(last - first, s.tiles.mr, s.tiles.row_step);
  const T* const left = s.panel(panel) + first - panel * width;
  for (int64_t q = 0; q < panels; ++q) {
    if (below ? q >= done && q < panel : q > panel || s.only_factor) continue;
    const int64_t columns = std::min(width, s.d - q * width);
    for (int64_t i = first; i < last; i += step) {
      gemm_detail::multiply_tile(s.tiles, s.depth, left + i - first, width, s.panel(q),
                                 below ? T(-1) : T(1), T(1),
                                 gemm_detail::Target<T>{s.x + i * s.d + q * width, s.d},
                                 std::min(step, last - i), columns);
    }
  }
}

// The rows of X of one panel's width.
template <class T>
void update_panel(const SweepStep<T>& s, int64_t panel) {
  const int64_t width = s.tiles.nr, i0 = panel * width, i1 = std::min(s.d, i0 + width);
  // What the sums start from: the block row and the block column now hold P.
  for (int64_t i = std::max(i0, s.k0); i < i1; ++i) {
    T* const row = s.x + i * s.d;
    if (i >= s.k1) {
      std::fill(row + s.k0, row + s.k1, T(0));
    } else if (!s.only_factor) {
      std::fill(row, row + s.k1, T(0));
    } else {
      for (int64_t j = 0; j < s.k1; ++j) {
        row[j] = s.panel(j / width)[(i - s.k0) * width + j % width];
      }
    }
  }
  update_rows(s, panel, i0, std::min(i1, s.k1));
  update_rows(s, panel, std::max(i0, s.k1), i1);
}

}  // namespace fused_so
