// Inner products of per-example gradients. A task makes a block of K: layer by layer the block's
// two Gram products, in scratch that stays in L2, and their elementwise product into K. So nothing
// of size n x n is stored but K, and K takes one parallel region.
// A layer costs n^2 (in + out) operations, half of two general products, and moves n (in + out)
// entries once for each row of blocks, and K once: bound by arithmetic from n of about 64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/column_sums.h"
#include "common/gemm.h"
#include "common/gram_block.h"
#include "common/lists.h"

namespace fused_so {
namespace {

// The g or the h of a layer. Centering replaces it by its rows less their mean m, and keeps what
// it took: m, |m|^2 and along_i = m . (x_i - m).
template <class S>
struct Operand {
  using T = Accumulate<S>;
  Matrix<S> x;
  std::vector<T> mean, along;
  double square = 0;
};

template <class S>
struct Layer {
  Operand<S> g, h;
  bool bias;
};

template <class S>
void center(Operand<S>& operand, Threads threads) {
  using T = Accumulate<S>;
  const Matrix<S> x = operand.x;
  std::vector<T>& mean = operand.mean;
  mean.resize(x.cols);
  column_sums(x, /*squares=*/false).divide(x.rows, mean.data());

  const Microkernel<T>& kernel = gemm_detail::microkernel<T>();
  const auto& readers = gemm_detail::readers<T, S>();
  operand.square = kernel.dot(x.cols, mean.data(), 1, mean.data());
  operand.along.resize(x.rows);
  constexpr int64_t kRows = 16;
  for_each_task(gemm_detail::divide_up(x.rows, kRows), threads, [&](int64_t task) {
    T* const shifted = gemm_detail::thread_scratch<T, gemm_detail::kPartials>(x.cols);
    for (int64_t i = task * kRows; i < std::min(x.rows, (task + 1) * kRows); ++i) {
      readers.scale_row(gemm_detail::as_bits(x.data) + i * x.row_stride, x.col_stride, x.cols, T(1),
                        T(1), mean.data(), shifted);
      operand.along[i] = static_cast<T>(kernel.dot(x.cols, shifted, 1, mean.data()));
    }
  });
  operand.x = x.minus(nullptr, mean.data());
}

template <class S>
void center_inputs(std::vector<Layer<S>>& layers, Threads threads) {
  const int64_t operands = 2 * static_cast<int64_t>(layers.size());
  // One parallel region for all of them, or, where they are too few for that, some in each.
  const Threads outer = operands >= count_workers(threads) ? threads : Threads::kOne;
  for_each_task(operands, outer, [&](int64_t task) {
    Layer<S>& layer = layers[task / 2];
    center(task % 2 == 0 ? layer.g : layer.h, threads);
  });
}

// K_ij += (X_ij + 1) Y_ij for the `count` first entries of a row; the 1 only with a bias.
template <class T>
void add_products(int64_t count, const T* __restrict x, const T* __restrict y, T bias,
                  T* __restrict k) {
  for (int64_t j = 0; j < count; ++j) k[j] += (x[j] + bias) * y[j];
}

// The same for centered x and y, with the means c of g and m of h, a_i = c . y_i, b_i = m . x_i:
// g_i (h_i, 1) = c (m, 1) + c (x_i, 0) + y_i (m, 1) + y_i (x_i, 0), and in the inner product of two
// of these all that H K H removes, which may be far larger than what it leaves, is left out:
// K_ij += (|c|^2 + a_i + a_j) X_ij + (|m|^2 + 1 + b_i + b_j) Y_ij + X_ij Y_ij + a_i b_j + a_j b_i.
template <class S, class T = Accumulate<S>>
void add_centered_products(const Layer<S>& layer, int64_t row, int64_t col, int64_t count,
                           const T* __restrict x, const T* __restrict y, T* __restrict k) {
  const T* __restrict a = layer.g.along.data() + col;
  const T* __restrict b = layer.h.along.data() + col;
  const T a_row = layer.g.along[row], b_row = layer.h.along[row];
  const T x_factor = static_cast<T>(layer.g.square + a_row);
  const T y_factor = static_cast<T>(layer.h.square + layer.bias + b_row);
  for (int64_t j = 0; j < count; ++j) {
    k[j] +=
        (x_factor + a[j]) * x[j] + (y_factor + b[j] + x[j]) * y[j] + (a_row * b[j] + b_row * a[j]);
  }
}

// K[rows, cols] and its mirror image.
template <class S, class T = Accumulate<S>>
void make_block(const std::vector<Layer<S>>& layers, Range rows, Range cols, T* k, int64_t n) {
  const int64_t width = gram_tiles<T>(n, /*cols=*/n).nr;  // that of all layers' tiles
  const int64_t ld = gemm_detail::divide_up(cols.count, width) * width;
  const int64_t size = gemm_detail::divide_up(rows.count, width) * width * ld;
  T* const x = gemm_detail::thread_scratch<T, gemm_detail::kPartials>(2 * size);
  T* const y = x + size;
  for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
    std::fill_n(k + i * n + cols.first, std::min(cols.count, i + 1 - cols.first), T(0));
  }
  for (const Layer<S>& layer : layers) {
    gram_block(layer.h.x, rows, cols, x, ld);
    gram_block(layer.g.x, rows, cols, y, ld);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.first + r, count = std::min(cols.count, i + 1 - cols.first);
      T* const to = k + i * n + cols.first;
      if (layer.g.along.empty()) {
        add_products(count, x + r * ld, y + r * ld, T(layer.bias), to);
      } else {
        add_centered_products(layer, i, cols.first, count, x + r * ld, y + r * ld, to);
      }
    }
  }
  gemm_detail::finish_symmetric(k, n, RankOne<T>{}, Triangle::kBoth, rows.first, cols.first,
                                rows.count, cols.count);
}

// K <- H K H: K_ij - (mean_i + mean_j - mean of all), the means in float64.
template <class T>
void center_gram(T* k, int64_t n, Threads threads) {
  // K is symmetric: its column sums are its row sums.
  std::vector<double> mean = column_sums(view<T>(k, n, n, n), /*squares=*/false).sums;
  double total = 0;
  for (double& value : mean) {
    value /= n;
    total += value / n;
  }
  for_each_task(n, threads, [&](int64_t i) {
    T* const row = k + i * n;
    const double* const means = mean.data();
    for (int64_t j = 0; j < n; ++j) {
      row[j] = static_cast<T>(row[j] - ((means[i] + means[j]) - total));
    }
  });
}

// The edge of a block. Every block packs its own rows, so they are as large as the L2 cache and the
// bound on scratch allow, but small enough that all workers get their share of the triangle.
template <class T>
int64_t choose_edge(int64_t n, int64_t workers) {
  constexpr int64_t kMaxEdge = 256, kAllScratch = 7 << 20;
  const Tiles<T>& tiles = gram_tiles<T>(n, /*cols=*/n);
  const int64_t unit = tiles.nr, slice = kGramDepth * tiles.b_width / tiles.nr;
  int64_t parts = 1;
  while (workers > 1 && parts * parts < 2 * workers) ++parts;
  int64_t edge = std::min(kMaxEdge, gemm_detail::divide_up(n, parts * unit) * unit);
  const auto bytes = [&] { return 2 * edge * (slice + edge) * static_cast<int64_t>(sizeof(T)); };
  while (edge > unit && bytes() * workers > kAllScratch) edge -= unit;
  return gemm_detail::even_part(n, edge, unit);
}

template <class S, class T = Accumulate<S>>
void make_gram(const std::vector<Layer<S>>& layers, T* k, int64_t n, Threads threads) {
  const int64_t edge = choose_edge<T>(n, count_workers(threads));
  const int64_t blocks = gemm_detail::divide_up(n, edge);
  const auto range = [&](int64_t block) {
    return Range{block * edge, std::min(edge, n - block * edge)};
  };
  // Blocks below the diagonal first: they are twice the work of those on it.
  std::vector<std::pair<int64_t, int64_t>> tasks;
  for (int64_t apart = blocks - 1; apart >= 0; --apart) {
    for (int64_t j = 0; j + apart < blocks; ++j) tasks.emplace_back(j + apart, j);
  }
  for_each_task(static_cast<int64_t>(tasks.size()), threads, [&](int64_t task) {
    make_block(layers, range(tasks[task].first), range(tasks[task].second), k, n);
  });
}

Tensor grad_gram(std::vector<Tensor> gs, std::vector<Tensor> hs, bool centered,
                 std::vector<bool> biases) {
  STD_TORCH_CHECK(!gs.empty(), "grad_gram: gs must hold at least one tensor, got an empty list");
  check_entries("grad_gram", "hs", hs, gs.size());
  check_entries("grad_gram", "biases", biases, gs.size());
  const int64_t n = gs[0].size(0);
  Tensor gram = empty_on_cpu({n, n}, accumulate_type(gs[0].scalar_type()));
  if (n == 0) return gram;
  with_type(gs[0].scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    std::vector<Layer<S>> layers;
    int64_t width = 0;
    for (size_t l = 0; l < gs.size(); ++l) {
      layers.push_back({{view<S>(gs[l])}, {view<S>(hs[l])}, biases[l]});
      width += gs[l].size(1) + hs[l].size(1);
    }
    // Waking the threads costs more than a small product.
    const bool small = n * n * width / 2 < gemm_detail::kSmallProduct;
    const Threads threads = small ? Threads::kOne : Threads::kAll;
    if (centered) center_inputs(layers, threads);
    auto* const k = write<Accumulate<S>>(gram);
    make_gram(layers, k, n, threads);
    if (centered) center_gram(k, n, threads);
  });
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) { m.impl("grad_gram", TORCH_BOX(&grad_gram)); }

}  // namespace fused_so
