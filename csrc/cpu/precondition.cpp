// The Kronecker-factored step: the rank-1 correction is made while the gradient is packed, and
// the scale 1/alpha where the product is written.
// 2 out in (in + out) operations for both sides; bound by arithmetic, but for the pass that
// takes dW m, of out in entries.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/gemm.h"

namespace fused_so {
namespace {

constexpr int64_t kBetweenBytes = 2 << 20;

template <class T, class S>
std::vector<T> to_vector(const Tensor& t) {
  std::vector<T> values(t.size(0));
  const S* from = read<S>(t);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(from[i * t.stride(0)]);
  return values;
}

// In float64: b is a difference of two products, and their rounding would show in it. Eight sums
// at a time, so that it vectorizes.
template <class T>
double dot(const T* x, int64_t stride, const T* y, int64_t size) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kSums <= size; i += kSums) {
      for (int l = 0; l < kSums; ++l) sums[l] += static_cast<double>(x[i + l]) * y[i + l];
    }
  }
  for (; i < size; ++i) sums[i % kSums] += static_cast<double>(x[i * stride]) * y[i];
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

// Y = scale (X - u v^T).
template <class S, class T = Accumulate<S>>
void scaled_copy(T scale, const Matrix<S>& x, T* y) {
  for_each_task(
      x.rows, x.rows * x.cols > (1 << 14) ? Threads::kAll : Threads::kOne, [&](int64_t i) {
        const S* from = x.data + i * x.row_stride;
        for (int64_t j = 0; j < x.cols; ++j) {
          y[i * x.cols + j] = scale * (static_cast<T>(from[j * x.col_stride]) - x.u[i] * x.v[j]);
        }
      });
}

// dW = scale Go X A; a missing factor is the identity.
template <class S, class T = Accumulate<S>>
void multiply_both_sides(T scale, const Matrix<S>& x, const std::optional<Tensor>& a,
                         const std::optional<Tensor>& go, T* dw) {
  const int64_t out = x.rows, in = x.cols;
  if (!a && !go) return scaled_copy(scale, x, dw);
  if (!go) return gemm(scale, x, view<T>(*a), T(0), dw, in, Threads::kAll);
  const Matrix<T> left = view<T>(*go);
  if (!a) return gemm(scale, left, x, T(0), dw, in, Threads::kAll);

  // A few columns at a time, so that what lies between the two products stays small.
  const int64_t fit = kBetweenBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, out);
  const int64_t step = gemm_detail::even_part(in, std::max<int64_t>(64, fit / 32 * 32), 32);
  std::vector<T> between(out * std::min(step, in));
  for (int64_t col = 0; col < in; col += step) {
    const int64_t cols = std::min(step, in - col);
    gemm(scale, x, view<T>(*a).block(0, col, in, cols), T(0), between.data(), cols, Threads::kAll);
    gemm(T(1), left, view(between.data(), out, cols, cols), T(0), dw + col, in, Threads::kAll);
  }
}

std::tuple<Tensor, Tensor> precondition(Tensor grad_weight, Tensor grad_bias, Tensor mean,
                                        std::optional<Tensor> input_inverse,
                                        std::optional<Tensor> output_inverse,
                                        std::optional<Tensor> alpha) {
  const int64_t out = grad_weight.size(0), in = grad_weight.size(1);
  const ScalarType type = accumulate_type(grad_weight.scalar_type());
  Tensor dw = torch::stable::new_empty(grad_weight, {out, in}, type);
  Tensor db = torch::stable::new_empty(grad_weight, {out}, type);
  with_type(grad_weight.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const std::vector<T> bias = to_vector<T, S>(grad_bias), m = to_vector<T, T>(mean);
    const T scale = alpha ? T(1) / *read<T>(*alpha) : T(1);
    // dW = 1/alpha Go (gw - gb m^T) A
    T* const weight = write<T>(dw);
    multiply_both_sides(scale, view<S>(grad_weight).minus(bias.data(), m.data()), input_inverse,
                        output_inverse, weight);
    // db = 1/alpha Go gb - dW m
    T* const b = write<T>(db);
    const Threads threads = out * (in + out) > (1 << 16) ? Threads::kAll : Threads::kOne;
    for_each_task(out, threads, [&](int64_t i) {
      double step = bias[i];
      if (output_inverse) {
        const Matrix<T> go = view<T>(*output_inverse);
        step = dot(go.data + i * go.row_stride, go.col_stride, bias.data(), out);
      }
      b[i] = static_cast<T>(scale * step - dot(weight + i * in, 1, m.data(), in));
    });
  });
  return {dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) { m.impl("precondition", TORCH_BOX(&precondition)); }

}  // namespace fused_so
