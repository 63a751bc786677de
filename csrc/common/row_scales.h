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
  bool has_bias;
  double bias_found;  // u^T b
  // u^T B; and sum_i w_i h_i with w_i = u^T g_i, then sum_i w_i and sum_i w_i^2.
  std::vector<double> found = std::vector<double>(h.cols + 2);
  std::vector<double> expected = std::vector<double>(h.cols + 2);

  int64_t in() const { return h.cols; }
  double bias_expected() const { return has_bias ? expected[in()] : 0; }

  double product() const { return inner(found, expected) + bias_found * bias_expected(); }
  double square() const { return inner(expected, expected) + bias_expected() * bias_expected(); }

  // Whether it is c, but for rounding, which is relative to the terms of the sums: |w| for those
  // of the bias. Sums that nearly cancel are less than their rounding, but |g| |(h, 1)| is not,
  // times |u| / sqrt(out), which is near |u^T g| / |g| for a random u; that takes a pass more.
  bool agrees(double c) const {
    double error = 0;
    for (int64_t j = 0; j < in(); ++j) {
      const double difference = found[j] - c * expected[j];
      error += difference * difference;
    }
    error = std::sqrt(error);
    const double bias_error = std::abs(bias_found - c * bias_expected());
    const double unit = 8 * std::numeric_limits<T>::epsilon() * std::abs(c);
    const auto within = [&](double size, double bias_size) {
      return error <= unit * size && bias_error <= unit * bias_size;
    };
    if (within(std::sqrt(inner(expected, expected)), std::sqrt(expected[in() + 1]))) return true;
    const double u_size = norm(Matrix<T>{u, 1, g.cols, g.cols, 1});
    const double g_size = norm(g) * u_size / std::sqrt(static_cast<double>(g.cols));
    return within(g_size * norm(h), g_size * std::sqrt(static_cast<double>(g.rows)));
  }

  double inner(const std::vector<double>& x, const std::vector<double>& y) const {
    return std::inner_product(x.begin(), x.begin() + in(), y.begin(), 0.0);
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
  if (x.cols == 0) return;  // there may be no memory behind it
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
  double* sums = nullptr;  // as the layer's `found` or `expected`

  void run() const {
    const auto& kernel = gemm_detail::microkernel<T>();
    const int64_t in = layer->in();
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

// c of every layer, or NaN. Memory: two numbers for each input, and at most 2 MiB.
template <class T>
void find_row_scales(std::vector<Probed<T>>& layers, bool common, double* scales) {
  constexpr int64_t kSums = 1 << 18, kLeastRows = 64;
  const int64_t count = static_cast<int64_t>(layers.size());
  std::vector<ProbedPart<T>> parts;
  int64_t room = 0, entries = 0;
  for (Probed<T>& layer : layers) {
    const int64_t in = layer.in();
    entries += layer.weight.rows * in + layer.g.rows * (in + layer.g.cols);
    const int64_t most = 1 + std::min<int64_t>(kSums / (2 * count * (in + 2)), 15);
    for (const bool examples : {false, true}) {
      const int64_t total = examples ? layer.g.rows : layer.weight.rows;
      const int64_t rows = std::max(kLeastRows, gemm_detail::divide_up(total, most));
      for (int64_t first = 0; first < total; first += rows) {
        parts.push_back({&layer, examples, first, std::min(rows, total - first)});
        if (first > 0) room += in + 2;
      }
    }
  }
  // The first part of each sum is added up in its place.
  std::vector<double> others(room);
  double* next = others.data();
  for (ProbedPart<T>& part : parts) {
    Probed<T>& layer = *part.layer;
    part.sums = part.first > 0 ? next : (part.examples ? layer.expected : layer.found).data();
    if (part.first > 0) next += layer.in() + 2;
  }
  // Waking the threads costs more than small layers.
  for_each_task_in_shares(static_cast<int64_t>(parts.size()),
                          entries > (1 << 16) ? Threads::kAll : Threads::kOne,
                          [&](int64_t p) { parts[p].run(); });
  for (const ProbedPart<T>& part : parts) {
    if (part.first == 0) continue;
    std::vector<double>& to = part.examples ? part.layer->expected : part.layer->found;
    for (size_t j = 0; j < to.size(); ++j) to[j] += part.sums[j];
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
