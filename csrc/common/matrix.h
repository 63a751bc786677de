// A view of a matrix wherever it lies: any strides, and optionally less a rank-1 term.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace fused_so {

// X - u v^T. A null u or v means ones; when both are null nothing is subtracted. With u null and
// v the column means, this is X centered.
template <class S>
struct Matrix {
  const S* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  const Accumulate<S>* u = nullptr;
  const Accumulate<S>* v = nullptr;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, v, u}; }

  Matrix block(int64_t row, int64_t col, int64_t block_rows, int64_t block_cols) const {
    return {data + row * row_stride + col * col_stride,
            block_rows,
            block_cols,
            row_stride,
            col_stride,
            u == nullptr ? u : u + row,
            v == nullptr ? v : v + col};
  }

  Matrix minus(const Accumulate<S>* row_factor, const Accumulate<S>* col_factor) const {
    return {data, rows, cols, row_stride, col_stride, row_factor, col_factor};
  }
};

template <class S>
Matrix<S> view(const S* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {data, rows, cols, row_stride, 1};
}

template <class S>
Matrix<S> view(const Tensor& t) {
  return {read<S>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

}  // namespace fused_so
