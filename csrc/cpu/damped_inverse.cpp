// (A + damping I)^-1 of symmetric positive definite matrices, in place in the result.
//
// d^3 operations and 8 d^2 bytes in float32 (reads half of A, writes the inverse): bound by
// arithmetic from d = 16 on. Small matrices go one to a thread; a large one is shared by all.
// Every entry is computed by one thread, always in the same order: the bits of the result do not
// depend on the number of threads. Memory beyond the result: one panel of rows a matrix at work.
// Reached, with tiles of its own before those of gemm.h, on two cores of an AMD EPYC (Zen 5) with
// AVX-512, where torch.mm runs at 190 GFLOP/s
// (bench/results/ops_cpu.json): 295 GFLOP/s at 1 x 1000, 188 at 16 x 256, 153 at 32 x 128, 82 at
// 64 x 64, where a chain of 64 square roots and divisions binds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/gemm.h"
#include "common/matrix.h"
#include "common/microkernel.h"
#include "common/parallel.h"
#include "common/spd_sweep.h"

namespace fused_so {
namespace {

using gemm_detail::divide_up;

// Rows of a block: few for a small matrix, whose panel products cost d^2 block; more for a large
// one, which every step reads and writes. At most 4 MiB of panels.
template <class T>
int64_t block_rows(int64_t d) {
  int64_t block = d <= 128 ? 16 : d <= 512 ? 32 : kMaxBlock;
  while (block > kFactorRows && block * d * int64_t{sizeof(T)} > (4 << 20)) block /= 2;
  return block;
}

template <class T>
class Inverter {
 public:
  explicit Inverter(int64_t d)
      : d_(d),
        block_(block_rows<T>(d)),
        w_(block_ * block_),
        wt_(block_ * block_),
        base_(kFactorRows * kFactorRows),
        block_panels_(kFactorRows * padded_width(block_)),
        panels_(block_ * padded_width(d)) {}

  // x: the matrix in the upper triangle; comes back as the inverse, in the lower one. Returns 0
  // or the order of the first leading minor that is not positive definite.
  int64_t run(T* x, Threads threads) {
    for (int64_t k0 = 0; k0 < d_; k0 += block_) {
      const int64_t k1 = std::min(d_, k0 + block_);
      const int64_t depth = divide_up(k1 - k0, kFactorRows) * kFactorRows;
      copy_block(x, k0, k1, depth);
      if (const int64_t order = factor_block(depth)) return k0 + order;
      kernel_.transpose(depth, depth, w_.data(), depth, wt_.data(), depth);
      apply({kernel_.tiles, x, d_, k0, k1, depth, wt_.data(), panels_.data(), false}, threads);
    }
    return 0;
  }

 private:
  int64_t padded_width(int64_t n) const {
    return divide_up(n, kernel_.tiles.nr) * kernel_.tiles.nr;
  }

  static void apply(const SweepStep<T>& step, Threads threads) {
    const int64_t panels = divide_up(step.d, step.tiles.nr);
    for_each_task(panels, threads, [&](int64_t q) { multiply_panel(step, q); });
    // A thread keeps its rows from one step to the next, in its own cache.
    for_each_task_in_shares(panels, threads, [&](int64_t q) { update_panel(step, q); });
  }

  // The block's upper triangle, padded with the identity, zeros below.
  void copy_block(const T* x, int64_t k0, int64_t k1, int64_t depth) {
    for (int64_t i = 0; i < depth; ++i) {
      T* row = w_.data() + i * depth;
      std::fill(row, row + depth, T(0));
      row[i] = T(1);
      if (k0 + i < k1) std::copy(x + (k0 + i) * d_ + k0 + i, x + (k0 + i) * d_ + k1, row + i);
    }
  }

  // A = L L^T in the upper triangle of w comes back as L^-1: the same sweep, without the product.
  int64_t factor_block(int64_t n) {
    T* w = w_.data();
    if (n == kFactorRows) return kernel_.factor(w, n);
    for (int64_t k0 = 0; k0 < n; k0 += kFactorRows) {
      T* const corner = w + k0 * n + k0;
      if (const int64_t order = kernel_.factor(corner, n)) return k0 + order;
      kernel_.transpose(kFactorRows, kFactorRows, corner, n, base_.data(), kFactorRows);
      apply({kernel_.tiles, w, n, k0, k0 + kFactorRows, kFactorRows, base_.data(),
             block_panels_.data(), true},
            Threads::kOne);
    }
    for (int64_t i = 0; i < n; ++i) std::fill(w + i * n + i + 1, w + (i + 1) * n, T(0));
    return 0;
  }

  const Microkernel<T>& kernel_ = gemm_detail::microkernel<T>();
  int64_t d_, block_;
  std::vector<T> w_, wt_, base_, block_panels_, panels_;
};

// to[j, i] = from[i, j] for j <= i: the lower triangle becomes the upper one, by panels of rows
// that the packing routine turns into columns. `from` may be `to` itself.
template <class T, class S>
void transpose_lower(Matrix<S> from, T* to, Threads threads) {
  constexpr int64_t kChunk = 64;
  const Tiles<T>& tiles = gemm_detail::microkernel<T>().tiles;
  const int64_t d = from.rows, width = tiles.b_width;
  for_each_task(divide_up(d, width), threads, [&](int64_t q) {
    alignas(64) T columns[kChunk * kMaxLanes];
    const int64_t i0 = q * width, i1 = std::min(d, i0 + width);
    for (int64_t j0 = 0; j0 < i1; j0 += kChunk) {
      const int64_t j1 = std::min(i1, j0 + kChunk);
      const Matrix<S> rows = from.block(i0, j0, i1 - i0, j1 - j0);
      gemm_detail::pack<T, S>(gemm_detail::packers<T, S>(tiles).pack_b, rows, 0, columns);
      for (int64_t j = j0; j < j1; ++j) {
        const T* column = columns + (j - j0) * width - i0;
        std::copy(column + std::max(i0, j), column + i1, to + j * d + std::max(i0, j));
      }
    }
  });
}

// The offset of matrix m of the batch, in elements.
int64_t batch_offset(const Tensor& a, int64_t m) {
  int64_t offset = 0;
  for (int64_t dim = a.dim() - 3; dim >= 0; --dim) {
    offset += m % a.size(dim) * a.stride(dim);
    m /= a.size(dim);
  }
  return offset;
}

template <class S>
void invert_all(const Tensor& a, const Tensor& damping, const Tensor& inverse, const Tensor& info) {
  using T = Accumulate<S>;
  const int64_t d = a.size(-1), batch = info.numel();
  const auto invert_one = [&](Inverter<T>& inverter, int64_t m, Threads threads) {
    T* x = write<T>(inverse) + m * d * d;
    const S* source = read<S>(a) + batch_offset(a, m);
    transpose_lower<T>(Matrix<S>{source, d, d, a.stride(-2), a.stride(-1)}, x, threads);
    for (int64_t i = 0; i < d; ++i) x[i * d + i] += read<T>(damping)[m];
    const int64_t order = inverter.run(x, threads);
    write<int32_t>(info)[m] = static_cast<int32_t>(order);
    if (order == 0) {
      transpose_lower<T>(view<T>(x, d, d, d), x, threads);
    } else {
      std::fill(x, x + d * d, std::numeric_limits<T>::quiet_NaN());
    }
  };

  // Sharing one matrix pays from d = 256 on; beyond 512 not every thread can have its own panels.
  const int64_t workers = torch::stable::get_num_threads();
  if (d > 512 || (d >= 256 && batch < workers)) {
    Inverter<T> inverter(d);
    for (int64_t m = 0; m < batch; ++m) invert_one(inverter, m, Threads::kAll);
    return;
  }
  std::atomic<int64_t> next{0};
  for_each_task(std::min(workers, batch), Threads::kAll, [&](int64_t) {
    Inverter<T> inverter(d);
    for (int64_t m = next++; m < batch; m = next++) invert_one(inverter, m, Threads::kOne);
  });
}

std::tuple<Tensor, Tensor> damped_inverse(Tensor a, Tensor damping) {
  Tensor inverse = empty_on_cpu(a.sizes(), accumulate_type(a.scalar_type()));
  Tensor info = empty_on_cpu(damping.sizes(), ScalarType::Int);
  if (!damping.is_contiguous()) damping = torch::stable::contiguous(damping);
  if (info.numel() != 0) {
    with_type(a.scalar_type(), [&](auto tag) {
      invert_all<typename decltype(tag)::type>(a, damping, inverse, info);
    });
  }
  return {inverse, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) {
  m.impl("damped_inverse", TORCH_BOX(&damped_inverse));
}

}  // namespace fused_so
