// Column sums of a matrix and the sum of all its squares, in float64, in one pass over it.
// 3 operations an entry: bound by memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/gemm.h"

namespace fused_so {

struct ColumnSums {
  std::vector<double> sums;
  double sum_of_squares = 0;  // 0 if not asked for

  template <class T>
  void divide(double divisor, T* to) const {
    for (size_t j = 0; j < sums.size(); ++j) to[j] = static_cast<T>(sums[j] / divisor);
  }
};

// Rows are cut into parts that depend on the shape alone and are added in order, so the result
// does not depend on the number of threads.
template <class S>
ColumnSums column_sums(const Matrix<S>& x, bool squares) {
  using T = Accumulate<S>;
  constexpr int64_t kCols = 1024, kMaxParts = 16, kMaxPartials = 1 << 17;
  const auto& readers = gemm_detail::readers<T, S>();
  const int64_t n = x.rows, d = x.cols;
  if (n == 0 || d == 0) return {std::vector<double>(d), 0};

  const int64_t max_parts = std::clamp<int64_t>(kMaxPartials / d, 1, kMaxParts);
  const int64_t part_rows =
      std::max<int64_t>(64, gemm_detail::divide_up(gemm_detail::divide_up(n, max_parts), 8) * 8);
  const int64_t parts = gemm_detail::divide_up(n, part_rows);
  const int64_t col_blocks = gemm_detail::divide_up(d, kCols);
  std::vector<double> partials(parts * d), partial_squares(parts * col_blocks);

  const Threads threads = n * d > (1 << 15) ? Threads::kAll : Threads::kOne;
  for_each_task(parts * col_blocks, threads, [&](int64_t task) {
    const int64_t part = task / col_blocks, col = task % col_blocks * kCols;
    const int64_t cols = std::min(kCols, d - col), row = part * part_rows;
    double square_sums[kCols] = {};
    readers.sum_columns(gemm_detail::as_bits(x.data) + row * x.row_stride + col * x.col_stride,
                        x.row_stride, x.col_stride, std::min(part_rows, n - row), cols,
                        partials.data() + part * d + col, squares ? square_sums : nullptr);
    for (int64_t j = 0; j < cols; ++j) partial_squares[task] += square_sums[j];
  });

  ColumnSums result{std::vector<double>(d), 0};
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t j = 0; j < d; ++j) result.sums[j] += partials[part * d + j];
  }
  for (const double total : partial_squares) result.sum_of_squares += total;
  return result;
}

}  // namespace fused_so
