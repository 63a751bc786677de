// A block of X X^T, the inner products of the rows of X, on the calling thread. With vectors a row
// is packed once, into a panel that a tile reads as its left operand and as its right one: where X
// has few rows, packing costs as much as the product. Scratch, kept by the thread: two blocks'
// panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm.h"

namespace fused_so {

constexpr int64_t kFewRows = 8;
constexpr int64_t kGramDepth = 256;  // deeper panels are no faster, and take more of each thread

struct Range {
  int64_t first, count;
};

// The tiles of all blocks of X X^T, as if there were two along each side: how many there are
// depends on the number of threads, on which no bit may depend.
template <class T>
const Tiles<T>& gram_tiles(int64_t rows, int64_t cols) {
  if (rows <= kFewRows) return gemm_detail::microkernel<T>().tiles;
  return gemm_detail::tiles_for<T>(rows / 2, rows / 2, cols);
}

// C[rows, cols] = X[rows, :] X[cols, :]^T. C has room for whole tiles. Where the block lies on the
// diagonal, those above it are left as they are.
template <class S, class T = Accumulate<S>>
void gram_block(const Matrix<S>& x, Range rows, Range cols, T* c, int64_t ldc) {
  using namespace gemm_detail;
  const Tiles<T>& tiles = gram_tiles<T>(x.rows, x.cols);
  // The product of a few rows is nearly a set of dot products, whose several accumulators BLAS
  // adds last: short sums are as accurate.
  const int64_t depth_limit = depth_part(tiles, x.cols, x.rows <= kFewRows ? 16 : kGramDepth);
  const int64_t lanes = tiles.nr, most = b_panel(tiles, depth_limit);
  const int64_t row_count = divide_up(rows.count, lanes), col_count = divide_up(cols.count, lanes);
  const bool shared = rows.first == cols.first && tiles.one_format;
  T* const right = thread_scratch<T, kPanelsOfB>(col_count * most);
  T* const left = shared ? right : thread_scratch<T, kPanelsOfA>(row_count * most);
  const Packers<T, Bits<S>>& packers_of_x = packers<T, S>(tiles);
  const auto pack_left = tiles.one_format ? packers_of_x.pack_b : packers_of_x.pack_a;

  // No columns at all still make C zero.
  for (int64_t depth = 0; depth == 0 || depth < x.cols; depth += depth_limit) {
    const int64_t steps = std::min(depth_limit, x.cols - depth);
    const int64_t size = b_panel(tiles, steps);
    const auto pack_rows = [&](PackPanel<T, Bits<S>> pack_panel, Range range, T* panels) {
      pack_all<T>(pack_panel, x.block(range.first, depth, range.count, steps), lanes, size, panels);
    };
    pack_rows(packers_of_x.pack_b, cols, right);
    if (!shared) pack_rows(pack_left, rows, left);
    const InUse<T> in_use(tiles);
    for (int64_t i = 0; i < row_count; ++i) {
      for (int64_t j = 0; j < (rows.first == cols.first ? i + 1 : col_count); ++j) {
        tiles.square(steps, left + i * size, right + j * size, depth == 0 ? 0 : 1,
                     c + i * lanes * ldc + j * lanes, ldc);
      }
    }
  }
}

}  // namespace fused_so
