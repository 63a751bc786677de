// Whether a layer's gradients B and b are c times the sums of its rows, sum_i g_i (h_i, 1)^T: both
// are multiplied by a vector u from the left (Freivalds 1977). 2 operations for each entry of B, g
// and h, which are read once: bound by memory. Sums are cut into parts that depend on the shapes
// alone and are added in order, so the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "common/gemm.h"
#include "common/matrix.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace fused_so {

// A layer, and what u says of it.
template <class T>
struct Probed {
  Matrix<T> g, h, weight;
  const T* u;
  std::vector<double> found{}, expected{};   // u^T B and sum_i w_i h_i, with w_i = u^T g_i
  double bias_found = 0, bias_expected = 0;  // u^T b and sum_i w_i
  double squares = 0;                        // sum_i w_i^2
  bool has_bias;

  double product() const { return inner(found, expected) + bias_found * bias_expected; }
  double square() const { return inner(expected, expected) + bias_expected * bias_expected; }

  // Whether it is c, but for rounding. Sums that nearly cancel are less than their rounding, but
  // |g| |(h, 1)| is not; that takes a pass more.
  bool agrees(double c) const {
    double error = 0;
    for (size_t j = 0; j < found.size(); ++j) {
      const double difference = found[j] - c * expected[j];
      error += difference * difference;
    }
    error = std::sqrt(error);
    const double bias_error = std::abs(bias_found - c * bias_expected);
    const double unit = 8 * std::numeric_limits<T>::epsilon() * std::abs(c);
    const auto within = [&](double size, double bias_size) {
      return error <= unit * size && bias_error <= unit * bias_size;
    };
    if (within(std::sqrt(inner(expected, expected)), std::sqrt(squares))) return true;
    const double g_size = norm(g);
    return within(g_size * norm(h), g_size * std::sqrt(static_cast<double>(g.rows)));
  }

  static double inner(const std::vector<double>& x, const std::vector<double>& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  }
  static double norm(const Matrix<T>& x) {
    double sum = 0;
    for (int64_t i = 0; i < x.rows; ++i) {
      const T* row = x.data + i * x.row_stride;
      sum += gemm_detail::microkernel<T>().dot(x.cols, row, 1, row);
    }
    return std::sqrt(sum);
  }
};

// Adds sum_i weights[i] x_i to sums: few rows in T, which are then added in float64.
template <class T>
void add_weighted_rows(const T* weights, const Matrix<T>& x, T* room, double* sums) {
  constexpr int64_t kRows = 16;
  for (int64_t row = 0; row < x.rows; row += kRows) {
    gemm_detail::microkernel<T>().combine_rows(std::min(kRows, x.rows - row), x.cols, weights + row,
                                               x.data + row * x.row_stride, x.row_stride, room);
    for (int64_t j = 0; j < x.cols; ++j) sums[j] += room[j];
  }
}

// Some rows of B, or some of g and h.
template <class T>
struct ProbedPart {
  Probed<T>* layer;
  bool examples;
  int64_t first, rows;
  double* sums = nullptr;  // of the columns; of examples then those of w and of w^2

  void run() const {
    const auto& kernel = gemm_detail::microkernel<T>();
    const int64_t in = layer->h.cols;
    thread_local Scratch scratch;
    T* const room = scratch.get<T>(in + rows);
    if (!examples) {
      return add_weighted_rows(layer->u + first, layer->weight.block(first, 0, rows, in), room,
                               sums);
    }
    T* const w = room + in;
    for (int64_t i = 0; i < rows; ++i) {
      const Matrix<T>& g = layer->g;
      const double along = kernel.dot(g.cols, g.data + (first + i) * g.row_stride, 1, layer->u);
      w[i] = static_cast<T>(along);
      sums[in] += along;
      sums[in + 1] += along * along;
    }
    add_weighted_rows(w, layer->h.block(first, 0, rows, in), room, sums);
  }
};

template <class T>
void find_row_scales(std::vector<Probed<T>>& layers, bool common, double* scales) {
  constexpr int64_t kSums = 1 << 18, kLeastRows = 64;  // 2 MiB of sums
  const int64_t count = static_cast<int64_t>(layers.size());
  std::vector<ProbedPart<T>> parts;
  int64_t sums = 0, entries = 0;
  for (Probed<T>& layer : layers) {
    const int64_t in = layer.h.cols;
    entries += layer.weight.rows * in + layer.g.rows * (in + layer.g.cols);
    const int64_t most = std::clamp<int64_t>(kSums / (2 * count * (in + 2)), 1, 16);
    for (const bool examples : {false, true}) {
      const int64_t total = examples ? layer.g.rows : layer.weight.rows;
      const int64_t rows = std::max(kLeastRows, gemm_detail::divide_up(total, most));
      for (int64_t first = 0; first < total; first += rows) {
        parts.push_back({&layer, examples, first, std::min(rows, total - first)});
        sums += in + 2;
      }
    }
  }
  std::vector<double> all_sums(sums);
  for (ProbedPart<T>& part : parts) part.sums = all_sums.data() + (sums -= part.layer->h.cols + 2);
  // Waking the threads costs more than small layers.
  for_each_task_in_shares(static_cast<int64_t>(parts.size()),
                          entries > (1 << 16) ? Threads::kAll : Threads::kOne,
                          [&](int64_t p) { parts[p].run(); });
  for (const ProbedPart<T>& part : parts) {
    Probed<T>& layer = *part.layer;
    std::vector<double>& to = part.examples ? layer.expected : layer.found;
    for (size_t j = 0; j < to.size(); ++j) to[j] += part.sums[j];
    if (part.examples && layer.has_bias) layer.bias_expected += part.sums[to.size()];
    if (part.examples) layer.squares += part.sums[to.size() + 1];
  }
  double product = 0, square = 0;
  for (int64_t l = 0; l < count; ++l) {
    const double own_product = layers[l].product(), own_square = layers[l].square();
    product += own_product, square += own_square;
    scales[l] = own_product / own_square;
  }
  for (int64_t l = 0; l < count; ++l) {
    const double c = common ? product / square : scales[l];
    scales[l] = layers[l].agrees(c) ? c : std::numeric_limits<double>::quiet_NaN();
  }
}

}  // namespace fused_so
