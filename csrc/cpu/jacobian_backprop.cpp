// The Jacobians of a batch through one linear layer and the activation after it: one product that
// multiplies by the activation's derivative while it packs, takes J direction from the same rows
// before they leave the cache, and pulls an example back as soon as its rows are complete.
// 2 n o out in operations, 2 n o (out + in) more for the pull-back; n o (out + in) entries moved,
// those of jac read once for each 1024 columns of the weight: bound by arithmetic from layers of
// about 64 features.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/gemm.h"

namespace fused_so {
namespace {

using gemm_detail::as_bits;
using gemm_detail::divide_up;

constexpr int64_t kMaxRows = 1 << 16;  // the rows whose J direction is kept at a time

// J = jac * dphi as a matrix: row i outputs + r is output r of example i. A null dphi means ones.
template <class S>
struct Jacobians {
  const S* jac;
  int64_t examples, outputs, cols;
  int64_t example_stride, output_stride, col_stride;
  Matrix<S> dphi, direction;

  int64_t rows() const { return examples * outputs; }

  Jacobians block(int64_t first, int64_t count) const {
    Jacobians part = *this;
    part.jac += first * example_stride;
    part.examples = count;
    if (dphi.data != nullptr) part.dphi = dphi.block(first, 0, count, cols);
    if (direction.data != nullptr) part.direction = direction.block(first, 0, count, cols);
    return part;
  }
};

template <class S>
Jacobians<S> jacobians(const Tensor& jac, const std::optional<Tensor>& dphi,
                       const std::optional<Tensor>& direction) {
  return {read<S>(jac),
          jac.size(0),
          jac.size(1),
          jac.size(2),
          jac.stride(0),
          jac.stride(1),
          jac.stride(2),
          dphi ? view<S>(*dphi) : Matrix<S>{},
          direction ? view<S>(*direction) : Matrix<S>{}};
}

// x[row, first .. first + count] as neighbours of type T, in `room` unless they are that already.
template <class S, class T = Accumulate<S>>
const T* row_part(const Matrix<S>& x, int64_t row, int64_t first, int64_t count, T* room) {
  if (x.data == nullptr) return nullptr;
  const S* from = x.data + row * x.row_stride + first * x.col_stride;
  if constexpr (std::is_same_v<S, T>) {
    if (x.col_stride == 1) return from;
  }
  gemm_detail::readers<T, S>().multiply_row(as_bits(from), x.col_stride, count, nullptr, nullptr,
                                            room);
  return room;
}

// Packs a panel of J, rows row .. row + rows and columns col .. col + steps, and unless `tangents`
// is null adds to them what these columns contribute to J direction.
template <class S, class T = Accumulate<S>>
void pack_rows(const Tiles<T>& tiles, const Jacobians<S>& j, int64_t row, int64_t rows, int64_t col,
               int64_t steps, T* tangents, T* panel) {
  // The rows' distance is no power of 2, for the L1 cache.
  constexpr int64_t kStride = kMaxDepth + 16;
  alignas(64) T scaled[kMaxLanes * kStride], dphi_room[kMaxDepth], direction_room[kMaxDepth];
  const T *dphi = nullptr, *direction = nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t example = (row + i) / j.outputs, output = (row + i) % j.outputs;
    if (i == 0 || output == 0) {
      dphi = row_part(j.dphi, example, col, steps, dphi_room);
      direction = row_part(j.direction, example, col, steps, direction_room);
    }
    const S* from =
        j.jac + example * j.example_stride + output * j.output_stride + col * j.col_stride;
    T* const to = scaled + i * kStride;
    // J = jac * dphi, t = J direction
    const T tangent = gemm_detail::readers<T, S>().multiply_row(
        as_bits(from), j.col_stride, steps, dphi, tangents != nullptr ? direction : nullptr, to);
    if (tangents != nullptr) tangents[row + i] += tangent;
  }
  gemm_detail::pack<T, T>(gemm_detail::packers<T, T>(tiles).pack_a,
                          view(scaled, rows, steps, kStride), 0, panel);
}

// jac_in = J weight, and unless it is null pullback_i = jac_in_i^T (J_i direction_i). All workers
// share the panels of the weight; each packs the rows of J that it multiplies.
template <class S, class T = Accumulate<S>>
class Backprop {
 public:
  Backprop(const Jacobians<S>& j, const Matrix<S>& weight, T* jac_in, T* pullback)
      : j_(j),
        weight_t_(weight.transposed()),
        jac_in_(jac_in),
        pullback_(pullback),
        tangents_(pullback != nullptr ? j.rows() : 0),
        rows_done_(pullback != nullptr ? j.examples : 0) {}

  void run() {
    T* const panels = gemm_detail::thread_scratch<T, gemm_detail::kPanelsOfB>(
        divide_up(blocking_.cols, tiles_.nr) * (slab_depth_ / depth_) *
        gemm_detail::b_panel(tiles_, depth_));
    for (int64_t col = 0; col < in_; col += blocking_.cols) {
      for (int64_t depth = 0; depth < out_; depth += slab_depth_) {
        const Slab slab{panels, depth, std::min(slab_depth_, out_ - depth), col,
                        std::min(blocking_.cols, in_ - col)};
        pack_weight(slab);
        for_each_task(divide_up(rows_, part_), threads_, [&](int64_t task) {
          const int64_t row = task * part_, rows = std::min(part_, rows_ - row);
          multiply_rows(slab, row, rows);
          if (pullback_ != nullptr && depth + slab.depth == out_) pull_back(slab, row, rows);
        });
      }
    }
  }

 private:
  // Columns col .. col + cols of the rows first .. first + depth of the weight, packed.
  struct Slab {
    T* panels;
    int64_t first, depth, col, cols;
  };

  T* panel_of(const Slab& slab, int64_t depth, int64_t panel) const {
    const int64_t before = divide_up(slab.cols, tiles_.nr) * (depth / depth_);
    return slab.panels + before * gemm_detail::b_panel(tiles_, depth_) +
           panel * gemm_detail::b_panel(tiles_, std::min(depth_, slab.depth - depth));
  }

  void pack_weight(const Slab& slab) const {
    const int64_t count = divide_up(slab.cols, tiles_.nr);
    for_each_task(count * divide_up(slab.depth, depth_), threads_, [&](int64_t task) {
      const int64_t depth = task / count * depth_, steps = std::min(depth_, slab.depth - depth);
      gemm_detail::pack<T, S>(gemm_detail::packers<T, S>(tiles_).pack_b,
                              weight_t_.block(slab.col, slab.first + depth, slab.cols, steps),
                              task % count * tiles_.nr, panel_of(slab, depth, task % count));
    });
  }

  void multiply_rows(const Slab& slab, int64_t row, int64_t rows) {
    T* const panels = gemm_detail::thread_scratch<T, gemm_detail::kPanelsOfA>(
        part_ / tiles_.mr * (slab_depth_ / depth_) * gemm_detail::a_panel(tiles_, depth_));
    T* const tangents = pullback_ != nullptr && slab.col == 0 ? tangents_.data() : nullptr;
    const int64_t block = divide_up(rows, tiles_.mr) * gemm_detail::a_panel(tiles_, depth_);
    for (int64_t i = 0; i < rows; i += tiles_.mr) {
      for (int64_t depth = 0; depth < slab.depth; depth += depth_) {
        const int64_t steps = std::min(depth_, slab.depth - depth);
        pack_rows(tiles_, j_, row + i, std::min(tiles_.mr, rows - i), slab.first + depth, steps,
                  tangents,
                  panels + block * (depth / depth_) +
                      i / tiles_.mr * gemm_detail::a_panel(tiles_, steps));
      }
    }
    const int64_t group = gemm_detail::even_part(slab.cols, blocking_.group, tiles_.nr);
    for (int64_t depth = 0; depth < slab.depth; depth += depth_) {
      const int64_t steps = std::min(depth_, slab.depth - depth);
      const T beta = slab.first + depth == 0 ? T(0) : T(1);
      for (int64_t col = 0; col < slab.cols; col += group) {
        gemm_detail::multiply_panels(
            tiles_, steps, gemm_detail::packed(tiles_, steps, panels + block * (depth / depth_)),
            panel_of(slab, depth, col / tiles_.nr), T(1), beta,
            {jac_in_ + row * in_ + slab.col + col, in_}, rows, std::min(group, slab.cols - col));
      }
    }
  }

  // Who completes an example's rows pulls it back: pullback_i = jac_in_i^T t_i.
  void pull_back(const Slab& slab, int64_t row, int64_t rows) {
    const int64_t last = (row + rows - 1) / j_.outputs;
    for (int64_t example = row / j_.outputs; example <= last; ++example) {
      const int64_t first = example * j_.outputs, end = first + j_.outputs;
      const int64_t added = std::min(row + rows, end) - std::max(row, first);
      if ((rows_done_[example].fetch_add(added) + added) % j_.outputs != 0) continue;
      gemm_detail::microkernel<T>().combine_rows(j_.outputs, slab.cols, tangents_.data() + first,
                                                 jac_in_ + first * in_ + slab.col, in_,
                                                 pullback_ + example * in_ + slab.col);
    }
  }

  // Where the weight is narrow two blocks of depth are packed: less to wait for.
  int64_t choose_slab_depth() const {
    const auto bytes = [&](int64_t width) {
      return gemm_detail::panel_bytes<T>(width, 2 * blocking_.depth);
    };
    const int64_t room = gemm_detail::panel_room(tiles_, gemm_detail::kScratchBytes);
    const bool fits = bytes(blocking_.cols / tiles_.nr * tiles_.b_width) <= room &&
                      bytes(tiles_.a_width) * count_workers(threads_) <= room;
    return blocking_.depth < out_ && fits ? 2 * blocking_.depth : blocking_.depth;
  }

  // The rows of a task: a multiple of the tile, few enough that all workers get their share.
  int64_t choose_part() const {
    // Each task reads all of the weight's panels.
    const int64_t workers = count_workers(threads_);
    const int64_t room = gemm_detail::panel_room(tiles_, gemm_detail::kScratchBytes);
    const int64_t bytes = std::min(tiles_.task_bytes, room / workers);
    const int64_t most = bytes / gemm_detail::panel_bytes<T>(tiles_.a_width, slab_depth_);
    const int64_t share = divide_up(rows_, tiles_.mr) / (4 * workers);
    return std::clamp<int64_t>(share, 1, std::max<int64_t>(1, most)) * tiles_.mr;
  }

  const Jacobians<S> j_;
  const Matrix<S> weight_t_;
  T *const jac_in_, *const pullback_;
  const int64_t rows_ = j_.rows(), out_ = weight_t_.cols, in_ = weight_t_.rows;
  const Threads threads_ =
      rows_ * out_ * in_ < gemm_detail::kSmallProduct ? Threads::kOne : Threads::kAll;
  const Tiles<T>& tiles_ = gemm_detail::tiles_for<T>(rows_, in_, out_);
  const gemm_detail::Blocking<T> blocking_{tiles_, rows_, in_, out_};
  const int64_t depth_ = blocking_.depth, slab_depth_ = choose_slab_depth();
  const int64_t part_ = choose_part();
  std::vector<T> tangents_;                      // t = J direction, a number for each row
  std::vector<std::atomic<int64_t>> rows_done_;  // of each example, added up over the columns
};

std::tuple<Tensor, Tensor> jacobian_backprop(Tensor jac, Tensor weight, std::optional<Tensor> dphi,
                                             std::optional<Tensor> direction) {
  const int64_t n = jac.size(0), outputs = jac.size(1), in = weight.size(1);
  const ScalarType type = accumulate_type(jac.scalar_type());
  Tensor jac_in = empty_on_cpu({n, outputs, in}, type);
  Tensor pullback = direction ? empty_on_cpu({n, in}, type) : empty_on_cpu({0}, type);
  if (n * outputs * weight.size(0) * in == 0) {
    torch::stable::zero_(jac_in);
    torch::stable::zero_(pullback);
    return {jac_in, pullback};
  }
  with_type(jac.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Jacobians<S> all = jacobians<S>(jac, dphi, direction);
    const int64_t step = std::max<int64_t>(1, kMaxRows / outputs);
    for (int64_t first = 0; first < n; first += step) {
      Backprop<S>(all.block(first, std::min(step, n - first)), view<S>(weight),
                  write<T>(jac_in) + first * outputs * in,
                  direction ? write<T>(pullback) + first * in : nullptr)
          .run();
    }
  });
  return {jac_in, pullback};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) {
  m.impl("jacobian_backprop", TORCH_BOX(&jacobian_backprop));
}

}  // namespace fused_so
