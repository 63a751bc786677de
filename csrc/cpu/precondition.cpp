// The Kronecker-factored step: products that make the rank-1 correction and the conversion while
// they pack their operand, and the scale 1/alpha while they store.
// 2 out in (in + out) operations for both sides; bound by arithmetic, but for the pass that
// takes dW m, of out in entries. And how long such steps are: inner_products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/gemm.h"
#include "common/lists.h"

namespace fused_so {
namespace {

template <class T, class S>
std::vector<T> to_vector(const Tensor& t) {
  std::vector<T> values(t.size(0));
  const S* from = read<S>(t);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(from[i * t.stride(0)]);
  return values;
}

// Y = scale (X - u v^T), row-major and contiguous.
template <class S, class T = Accumulate<S>>
void scaled_copy(T scale, const Matrix<S>& x, T* y) {
  const auto& readers = gemm_detail::readers<T, S>();
  const bool subtract = x.u != nullptr || x.v != nullptr;
  const int64_t rows_a_task = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, x.cols));
  const Threads threads = x.rows * x.cols > (1 << 17) ? Threads::kAll : Threads::kOne;
  for_each_task(gemm_detail::divide_up(x.rows, rows_a_task), threads, [&](int64_t task) {
    const int64_t end = std::min(x.rows, (task + 1) * rows_a_task);
    for (int64_t i = task * rows_a_task; i < end; ++i) {
      const T u = !subtract ? T(0) : x.u == nullptr ? T(1) : x.u[i];
      readers.scale_row(gemm_detail::as_bits(x.data) + i * x.row_stride, x.col_stride, x.cols,
                        scale, u, x.v, y + i * x.cols);
    }
  });
}

// dW = scale Go (X - u v^T) A; a missing factor is the identity.
template <class S, class T = Accumulate<S>>
void multiply_both_sides(T scale, const Matrix<S>& x, const std::optional<Tensor>& a,
                         const std::optional<Tensor>& go, const Tensor& dw) {
  const int64_t out = x.rows, in = x.cols;
  T* const to = write<T>(dw);
  if (!a && !go) return scaled_copy(scale, x, to);
  if (!go) return gemm(scale, x, view<T>(*a), T(0), to, in, Threads::kAll);
  if (!a) return gemm(scale, view<T>(*go), x, T(0), to, in, Threads::kAll);
  // Some rows of what lies between the two products at a time, so that it stays small: A, which is
  // cheaper to pack than the others, is packed again for each. With all panels 7.25 MiB: the rest
  // of 8 is for what the threads touch.
  constexpr int64_t kBytes = 29 << 18, kMostBytes = 2 << 20;
  const int64_t panels = gemm_detail::panel_room(gemm_detail::tiles_for<T>(out, in, in),
                                                 2 * gemm_detail::kScratchBytes);
  const int64_t bytes = std::min(kMostBytes, kBytes - panels);
  const int64_t fitting = bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, in);
  const int64_t step = gemm_detail::even_part(out, std::max<int64_t>(32, fitting / 32 * 32), 32);
  thread_local Scratch scratch;
  T* const between = scratch.get<T>(step * in);
  const Matrix<T> left = view<T>(*go);
  for (int64_t row = 0; row < out; row += step) {
    const int64_t rows = std::min(step, out - row);
    gemm(scale, x.block(row, 0, rows, in), view<T>(*a), T(0), between, in, Threads::kAll);
    gemm(T(1), left.block(0, row, out, rows), view(between, rows, in, in), T(row > 0), to, in,
         Threads::kAll);
  }
}

std::tuple<Tensor, Tensor> precondition(Tensor grad_weight, Tensor grad_bias, Tensor mean,
                                        std::optional<Tensor> input_inverse,
                                        std::optional<Tensor> output_inverse,
                                        std::optional<Tensor> alpha) {
  const int64_t out = grad_weight.size(0), in = grad_weight.size(1);
  const ScalarType type = accumulate_type(grad_weight.scalar_type());
  Tensor dw = empty_on_cpu({out, in}, type);
  Tensor db = empty_on_cpu({out}, type);
  with_type(grad_weight.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const std::vector<T> bias = to_vector<T, S>(grad_bias), m = to_vector<T, T>(mean);
    const T scale = alpha ? T(1) / *read<T>(*alpha) : T(1);
    // dW = 1/alpha Go (gw - gb m^T) A
    T* const weight = write<T>(dw);
    multiply_both_sides(scale, view<S>(grad_weight).minus(bias.data(), m.data()), input_inverse,
                        output_inverse, dw);
    // db = 1/alpha Go gb - dW m
    T* const b = write<T>(db);
    // b is a difference of two products, and their rounding would show in it: in float64.
    const auto dot = gemm_detail::microkernel<T>().dot;
    const Threads threads = out * (in + out) > (1 << 18) ? Threads::kAll : Threads::kOne;
    const Matrix<T> go = output_inverse ? view<T>(*output_inverse) : Matrix<T>{};
    constexpr int64_t kRows = 16;
    for_each_task(gemm_detail::divide_up(out, kRows), threads, [&](int64_t task) {
      for (int64_t i = task * kRows; i < std::min(out, (task + 1) * kRows); ++i) {
        double step = bias[i];
        if (output_inverse) {
          step = dot(out, go.data + i * go.row_stride, go.col_stride, bias.data());
        }
        b[i] = static_cast<T>(scale * step - dot(in, weight + i * in, 1, m.data()));
      }
    });
  });
  return {dw, db};
}

// One layer after the other: a call costs the same for each, and large products use all threads.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> precondition_list(
    std::vector<Tensor> grad_weight, std::vector<Tensor> grad_bias, std::vector<Tensor> mean,
    std::optional<std::vector<Tensor>> input_inverse,
    std::optional<std::vector<Tensor>> output_inverse, std::optional<std::vector<Tensor>> alpha) {
  const char* const op = "precondition_list";
  check_entries(op, "grad_bias", grad_bias, grad_weight.size());
  check_entries(op, "mean", mean, grad_weight.size());
  if (input_inverse) check_entries(op, "input_inverse", *input_inverse, grad_weight.size());
  if (output_inverse) check_entries(op, "output_inverse", *output_inverse, grad_weight.size());
  if (alpha) check_entries(op, "alpha", *alpha, grad_weight.size());
  const auto entry = [](const std::optional<std::vector<Tensor>>& list, size_t i) {
    return list ? std::optional<Tensor>((*list)[i]) : std::nullopt;
  };
  std::vector<Tensor> dws, dbs;
  for (size_t i = 0; i < grad_weight.size(); ++i) {
    auto [dw, db] = precondition(grad_weight[i], grad_bias[i], mean[i], entry(input_inverse, i),
                                 entry(output_inverse, i), entry(alpha, i));
    dws.push_back(dw);
    dbs.push_back(db);
  }
  return {dws, dbs};
}

// The sums of x_i y_i of every pair of tensors, in float64 and one parallel region. Both are read
// once, which binds. A pair that is not contiguous is copied, one at a time.
Tensor inner_products(std::vector<Tensor> x, std::vector<Tensor> y) {
  check_entries("inner_products", "y", y, x.size());
  constexpr int64_t kEntries = 1 << 16;
  struct Part {
    size_t pair;
    int64_t first, count;
    double sum;
  };
  const auto dot = [](const Tensor& a, const Tensor& b, int64_t first, int64_t count) {
    return with_type(a.scalar_type(), [&](auto tag) {
      using S = typename decltype(tag)::type;
      if constexpr (std::is_same_v<S, Accumulate<S>>) {
        return gemm_detail::microkernel<S>().dot(count, read<S>(a) + first, 1, read<S>(b) + first);
      } else {
        return 0.0;  // refused below
      }
    });
  };
  Tensor result = empty_on_cpu({static_cast<int64_t>(x.size())}, ScalarType::Double);
  double* const sums = write<double>(result);
  std::vector<Part> parts;
  int64_t entries = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const ScalarType type = x[i].scalar_type();
    STD_TORCH_CHECK(type == accumulate_type(type), "inner_products: x must be float32 or float64");
    // The public function has checked the pairs and names the argument; nobody is to read beyond.
    STD_TORCH_CHECK(y[i].scalar_type() == type && y[i].numel() == x[i].numel(),
                    "inner_products: the tensors of pair ", i, " do not fit");
    sums[i] = 0;
    const int64_t total = x[i].numel();
    if (!x[i].is_contiguous() || !y[i].is_contiguous()) {
      sums[i] = dot(torch::stable::contiguous(x[i]), torch::stable::contiguous(y[i]), 0, total);
      continue;
    }
    entries += total;
    for (int64_t first = 0; first < total; first += kEntries) {
      parts.push_back({i, first, std::min(kEntries, total - first), 0.0});
    }
  }
  // Waking the threads costs more than two parts.
  for_each_task_in_shares(static_cast<int64_t>(parts.size()),
                          entries > 2 * kEntries ? Threads::kAll : Threads::kOne, [&](int64_t p) {
                            Part& part = parts[p];
                            part.sum = dot(x[part.pair], y[part.pair], part.first, part.count);
                          });
  for (const Part& part : parts) sums[part.pair] += part.sum;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) {
  m.impl("inner_products", TORCH_BOX(&inner_products));
  m.impl("precondition", TORCH_BOX(&precondition));
  m.impl("precondition_list", TORCH_BOX(&precondition_list));
}

}  // namespace fused_so
