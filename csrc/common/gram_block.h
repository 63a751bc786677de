// A block of X X^T, the inner products of the rows of X, on the calling thread. A row is packed
// once, into a panel that a tile reads as its left operand and as its right one: where X has few
// rows, packing costs as much as the product. Scratch, kept by the thread: two blocks' panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm.h"

namespace fused_so {

constexpr int64_t kFewRows = 8;

struct Range {
  int64_t first, count;
};

// C[rows, cols] = X[rows, :] X[cols, :]^T. C has room for whole panels: both counts rounded up to a
// multiple of the micro-kernel's nr. Where the block lies on the diagonal, the panels above it are
// left as they are.
template <class S, class T = Accumulate<S>>
void gram_block(const Matrix<S>& x, Range rows, Range cols, T* c, int64_t ldc) {
  using namespace gemm_detail;
  const Microkernel<T>& kernel = microkernel<T>();
  // The product of a few rows is nearly a set of dot products, whose several accumulators BLAS
  // adds last: short sums are as accurate.
  const int64_t depth_max = x.rows <= kFewRows ? 16 : kDepth;
  const int64_t width = kernel.nr, depth_limit = even_part(x.cols, depth_max, 16);
  const int64_t row_count = divide_up(rows.count, width), col_count = divide_up(cols.count, width);
  const bool diagonal = rows.first == cols.first;
  T* const right = thread_scratch<T, kPanelsOfB>(col_count * width * depth_limit);
  T* const left = diagonal ? right : thread_scratch<T, kPanelsOfA>(row_count * width * depth_limit);

  // No columns at all still make C zero.
  for (int64_t depth = 0; depth == 0 || depth < x.cols; depth += depth_limit) {
    const int64_t steps = std::min(depth_limit, x.cols - depth);
    const auto pack_rows = [&](Range range, T* panels) {
      pack_all<T>(readers<T, S>(kernel).pack_b, x.block(range.first, depth, range.count, steps),
                  width, width, panels);
    };
    pack_rows(cols, right);
    if (!diagonal) pack_rows(rows, left);
    for (int64_t i = 0; i < row_count; ++i) {
      for (int64_t j = 0; j < (diagonal ? i + 1 : col_count); ++j) {
        kernel.square(steps, left + i * width * steps, right + j * width * steps,
                      depth == 0 ? 0 : 1, c + i * width * ldc + j * width, ldc);
      }
    }
  }
}

}  // namespace fused_so
