// Products through the BLAS that torch was built with, where it is faster than gemm.h: on large
// operands that already lie in memory in the accumulate dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "common/dispatch.h"
#include "common/matrix.h"
#include "common/parallel.h"

namespace fused_so {

// From this many multiply-adds on BLAS makes up for the detour through the dispatcher and a copy.
constexpr int64_t kLargeProduct = 1 << 26;

// out = a b.
inline void blas_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

// Y = scale (X - u v^T), row-major and contiguous.
template <class S, class T = Accumulate<S>>
void scaled_copy(T scale, const Matrix<S>& x, T* y) {
  const int64_t rows_a_task = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, x.cols));
  const bool subtract = x.u != nullptr || x.v != nullptr;
  const Threads threads = x.rows * x.cols > (1 << 15) ? Threads::kAll : Threads::kOne;
  for_each_task((x.rows + rows_a_task - 1) / rows_a_task, threads, [&](int64_t task) {
    const int64_t end = std::min(x.rows, (task + 1) * rows_a_task);
    for (int64_t i = task * rows_a_task; i < end; ++i) {
      const S* from = x.data + i * x.row_stride;
      T* to = y + i * x.cols;
      const T u = !subtract ? T(0) : x.u == nullptr ? T(1) : x.u[i];
      for (int64_t j = 0; j < x.cols; ++j) to[j] = static_cast<T>(from[j * x.col_stride]);
      if (x.v != nullptr) {
        for (int64_t j = 0; j < x.cols; ++j) to[j] = scale * (to[j] - u * x.v[j]);
      } else {
        for (int64_t j = 0; j < x.cols; ++j) to[j] = scale * (to[j] - u);
      }
    }
  });
}

}  // namespace fused_so
