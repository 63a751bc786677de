// Weight gradient of a linear layer with its input centered: a pass over g and one over h for
// the column sums, and one product that subtracts the mean while it packs h, so that large means
// do not cancel against each other.
// 2 n out in operations; n (out + in) entries read twice: bound by arithmetic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/allocate.h"
#include "common/column_sums.h"
#include "common/gemm.h"

namespace fused_so {
namespace {

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
    T* const m = write<T>(mean);
    column_sums(g_view, /*squares=*/false).divide(1, write<T>(grad_bias));
    column_sums(h_view, /*squares=*/false).divide(std::max<int64_t>(n, 1), m);
    // dW = G^T (H - 1 m^T), or G^T H
    gemm(T(1), g_view.transposed(), centered ? h_view.minus(nullptr, m) : h_view, T(0),
         write<T>(grad_weight), in, Threads::kAll);
  });
  return {grad_weight, grad_bias, mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) { m.impl("centered_grad", TORCH_BOX(&centered_grad)); }

}  // namespace fused_so
