// Weight gradient of a linear layer with its input centered, so that large means do not cancel
// against each other. Where dW is large: a pass over g and, centered, one over h for the column
// sums, and one product that subtracts the mean while it packs h. Where it is small: parts of the
// rows, of which each block is summed and multiplied while it is in the cache. 2 n out in
// operations, and n (out + in) additions; n (out + in) entries read from memory twice, or once:
// bound by arithmetic. And whether a gradient is such a sum at all: row_scales.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/column_sums.h"
#include "common/gemm.h"
#include "common/lists.h"
#include "common/row_scales.h"

namespace fused_so {
namespace {

using gemm_detail::Target;

template <class S>
void add_column_sums(const Matrix<S>& x, double* sums) {
  using T = Accumulate<S>;
  gemm_detail::readers<T, S>().sum_columns(gemm_detail::as_bits(x.data), x.row_stride, x.col_stride,
                                           x.rows, x.cols, sums, nullptr);
}

// weight = sum_i g_i (h_i - m)^T, and the column sums of g and h are added to theirs. m is the mean
// of the rows that were read, and moves with each block of them: whatever m and m' are,
// sum_i g_i (h_i - m')^T = sum_i g_i (h_i - m)^T - (sum_i g_i) (m' - m)^T.
template <class S, class T = Accumulate<S>>
void sum_rows(const Matrix<S>& g, const Matrix<S>& h, bool centered, double* g_sums, double* h_sums,
              T* m, T* weight) {
  const auto& readers = gemm_detail::readers<T, T>();
  const int64_t n = g.rows, out = g.cols, in = h.cols;
  constexpr int64_t kRows = 256;  // their columns stay in the cache
  const int64_t step = gemm_detail::even_part(n, kRows, 32);
  std::vector<T> moved(in);
  for (int64_t row = 0; row < n; row += step) {
    const int64_t rows = std::min(step, n - row);
    const Matrix<S> g_rows = g.block(row, 0, rows, out), h_rows = h.block(row, 0, rows, in);
    if (centered) {
      add_column_sums(h_rows, h_sums);
      for (int64_t j = 0; j < in; ++j) {
        const T mean = static_cast<T>(h_sums[j] / (row + rows));
        moved[j] = mean - m[j];
        m[j] = mean;
      }
      for (int64_t i = 0; row > 0 && i < out; ++i) {
        T* const to = weight + i * in;
        readers.scale_row(to, 1, in, T(1), static_cast<T>(g_sums[i]), moved.data(), to);
      }
    }
    add_column_sums(g_rows, g_sums);
    gemm_detail::multiply_alone(gemm_detail::tiles_for<T>(out, in, rows), T(1), g_rows.transposed(),
                                centered ? h_rows.minus(nullptr, m) : h_rows, T(row > 0),
                                Target<T>{weight, in});
  }
}

template <class S, class T = Accumulate<S>>
void sum_parts(const gemm_detail::Parts<T>& parts, const Matrix<S>& g, const Matrix<S>& h,
               bool centered, T* weight, T* bias, T* mean) {
  const int64_t out = g.cols, in = h.cols, count = parts.count;
  std::vector<double> g_sums(count * out), h_sums(count * in);
  std::vector<T> means(count * in);
  parts.multiply(Threads::kAll, [&](int64_t p, int64_t first, int64_t rows, T* partial) {
    sum_rows(g.block(first, 0, rows, out), h.block(first, 0, rows, in), centered,
             g_sums.data() + p * out, h_sums.data() + p * in, means.data() + p * in, partial);
  });
  column_sums(view(g_sums.data(), count, out, out), /*squares=*/false).divide(1, bias);
  column_sums(view(h_sums.data(), count, in, in), /*squares=*/false).divide(g.rows, mean);

  // Each part's s = sum_i g_i and m - m_p.
  const std::vector<T> s(g_sums.begin(), g_sums.end());
  std::vector<T> moved(count * in);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t j = 0; j < in; ++j) moved[p * in + j] = mean[j] - means[p * in + j];
  }
  const Matrix<T> s_view = view(s.data(), count, out, out);
  const Matrix<T> moved_view = view(moved.data(), count, in, in);
  // dW = sum_p (dW_p - s_p (m - m_p)^T)
  const Target<T> target{weight, in};
  parts.add(T(1), T(0), target, Threads::kAll,
            [&](int64_t row, int64_t col, int64_t rows, int64_t cols) {
              if (!centered) return;
              gemm_detail::multiply_alone(gemm_detail::microkernel<T>().tiles, T(-1),
                                          s_view.block(0, row, count, rows).transposed(),
                                          moved_view.block(0, col, count, cols), T(1),
                                          target.block(row, col));
            });
}

std::tuple<Tensor, Tensor, Tensor> centered_grad(Tensor g, Tensor h, bool centered) {
  const int64_t n = g.size(0), out = g.size(1), in = h.size(1);
  const ScalarType type = accumulate_type(g.scalar_type());
  Tensor grad_weight = empty_on_cpu({out, in}, type);
  Tensor grad_bias = empty_on_cpu({out}, type);
  Tensor mean = empty_on_cpu({in}, type);
  with_type(g.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Matrix<S> g_view = view<S>(g), h_view = view<S>(h);
    T *const w = write<T>(grad_weight), *const b = write<T>(grad_bias), *const m = write<T>(mean);
    const gemm_detail::Parts<T> parts{out, in, n};
    if (parts.count > 1) return sum_parts(parts, g_view, h_view, centered, w, b, m);
    column_sums(g_view, /*squares=*/false).divide(1, b);
    if (centered) {
      column_sums(h_view, /*squares=*/false).divide(std::max<int64_t>(n, 1), m);
    } else {
      std::fill_n(m, in, T(0));
    }
    // dW = G^T (H - 1 m^T), or G^T H
    gemm(T(1), g_view.transposed(), centered ? h_view.minus(nullptr, m) : h_view, T(0), w, in,
         Threads::kAll);
  });
  return {grad_weight, grad_bias, mean};
}

// See common/row_scales.h.
Tensor row_scales(std::vector<Tensor> g, std::vector<Tensor> h, std::vector<Tensor> grad_weight,
                  std::vector<Tensor> grad_bias, std::vector<Tensor> probes, bool common) {
  check_entries("row_scales", "h", h, g.size());
  check_entries("row_scales", "grad_weight", grad_weight, g.size());
  check_entries("row_scales", "grad_bias", grad_bias, g.size());
  check_entries("row_scales", "probes", probes, g.size());
  const int64_t count = static_cast<int64_t>(g.size());
  Tensor scales = empty_on_cpu({count}, ScalarType::Double);
  if (count == 0) return scales;
  const ScalarType type = g[0].scalar_type();
  STD_TORCH_CHECK(type == accumulate_type(type), "row_scales: g must be float32 or float64");
  // The public function has checked shapes and names the argument; nobody is to read beyond.
  for (int64_t l = 0; l < count; ++l) {
    const int64_t n = g[l].size(0), out = g[l].size(1), in = h[l].size(1);
    const int64_t bias = grad_bias[l].numel();
    STD_TORCH_CHECK(h[l].size(0) == n && grad_weight[l].size(0) == out &&
                        grad_weight[l].size(1) == in && probes[l].numel() == out &&
                        (bias == 0 || bias == out),
                    "row_scales: the shapes of layer ", l, " do not fit");
    for (Tensor* t : {&g[l], &h[l], &grad_weight[l], &grad_bias[l], &probes[l]}) {
      STD_TORCH_CHECK(t->scalar_type() == type, "row_scales: all must have one dtype");
      // What has gaps within its rows is copied.
      if (t->stride(-1) != 1) *t = torch::stable::contiguous(*t);
    }
  }
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if constexpr (std::is_same_v<S, Accumulate<S>>) {
      std::vector<Probed<S>> layers;
      layers.reserve(count);
      for (int64_t l = 0; l < count; ++l) {
        const bool has_bias = grad_bias[l].numel() != 0;
        const S* const u = read<S>(probes[l]);
        layers.push_back(
            {view<S>(g[l]), view<S>(h[l]), view<S>(grad_weight[l]), u, has_bias,
             has_bias ? gemm_detail::microkernel<S>().dot(g[l].size(1), read<S>(grad_bias[l]), 1, u)
                      : 0.0});
      }
      find_row_scales(layers, common, write<double>(scales));
    }
  });
  return scales;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) {
  m.impl("centered_grad", TORCH_BOX(&centered_grad));
  m.impl("row_scales", TORCH_BOX(&row_scales));
}

}  // namespace fused_so
