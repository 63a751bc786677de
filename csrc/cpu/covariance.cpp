// Covariance of the rows of a matrix: one pass for the column sums, and one symmetric product
// that centers while it packs and mixes the running average in where it writes.
// n d^2 operations (half of a general product), against which the bytes, 2 n d + 2 d^2 entries,
// count only when n is small: bound by arithmetic from n of about 64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/column_sums.h"
#include "common/gemm.h"
#include "common/lists.h"

namespace fused_so {
namespace {

// C = beta C + alpha (H - 1 m^T)^T (H - 1 m^T) + w s s^T; mean null: m = 0.
template <class S, class T = Accumulate<S>>
void scatter(T alpha, const Matrix<S>& h, const T* mean, T beta, const Tensor& cov,
             RankOne<T> term) {
  symmetric_product(alpha, h.minus(nullptr, mean).transposed(), beta, write<T>(cov), h.cols,
                    Triangle::kBoth, Threads::kAll, term);
}

std::tuple<Tensor, Tensor> covariance(Tensor h, bool centered) {
  const int64_t n = h.size(0), d = h.size(1);
  const ScalarType type = accumulate_type(h.scalar_type());
  Tensor cov = empty_on_cpu({d, d}, type);
  Tensor mean = empty_on_cpu({d}, type);
  if (n == 0) {
    torch::stable::zero_(cov);
    torch::stable::zero_(mean);
    return {cov, mean};
  }
  with_type(h.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    T* const m = write<T>(mean);
    column_sums(view<S>(h), /*squares=*/false).divide(n, m);
    scatter<S>(T(1) / n, view<S>(h), centered ? m : nullptr, T(0), cov, {});
  });
  return {cov, mean};
}

// Whether the batch was taken. Nothing is written before the batch is known to be finite.
template <class S>
bool mix(const Tensor& cov, const Tensor& mean, const Tensor& h, double decay, bool centered) {
  using T = Accumulate<S>;
  const int64_t n = h.size(0), d = h.size(1);
  if (n == 0) return false;
  const ColumnSums statistics = column_sums(view<S>(h), /*squares=*/true);
  if (!(statistics.sum_of_squares <= std::numeric_limits<T>::max())) return false;
  if (decay == 1) return true;

  std::vector<T> batch_mean(d);
  statistics.divide(n, batch_mean.data());
  T* const m = write<T>(mean);
  const T beta = static_cast<T>(decay), rest = static_cast<T>(1 - decay);
  // C <- beta C + (1-beta)/n (H-1 m_b^T)^T (H-1 m_b^T) + beta (1-beta) (m-m_b)(m-m_b)^T
  std::vector<T> shift;
  RankOne<T> term;
  if (centered && decay > 0) {
    shift.resize(d);
    for (int64_t j = 0; j < d; ++j) shift[j] = m[j] - batch_mean[j];
    term = {static_cast<T>(decay * (1 - decay)), shift.data()};
  }
  scatter<S>(static_cast<T>((1 - decay) / n), view<S>(h), centered ? batch_mean.data() : nullptr,
             beta, cov, term);
  // m <- beta m + (1-beta) m_b; a decay of 0 does not read m, which may be NaN.
  for (int64_t j = 0; j < d; ++j) {
    m[j] = decay > 0 ? beta * m[j] + rest * batch_mean[j] : batch_mean[j];
  }
  return true;
}

bool mix_layer(const Tensor& cov, const Tensor& mean, const Tensor& h, double decay,
               bool centered) {
  return with_type(h.scalar_type(), [&](auto tag) {
    return mix<typename decltype(tag)::type>(cov, mean, h, decay, centered);
  });
}

Tensor covariance_(Tensor cov, Tensor mean, Tensor h, double decay, bool centered) {
  Tensor accepted = empty_on_cpu({}, ScalarType::Bool);
  *static_cast<bool*>(accepted.mutable_data_ptr()) = mix_layer(cov, mean, h, decay, centered);
  return accepted;
}

Tensor covariance_list(std::vector<Tensor> covs, std::vector<Tensor> means, std::vector<Tensor> hs,
                       std::vector<double> decays, bool centered) {
  const size_t count = hs.size();
  check_entries("covariance_list_", "cov", covs, count);
  check_entries("covariance_list_", "mean", means, count);
  check_entries("covariance_list_", "decay", decays, count);
  Tensor accepted = empty_on_cpu({static_cast<int64_t>(count)}, ScalarType::Bool);
  bool* const taken = static_cast<bool*>(accepted.mutable_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    taken[i] = mix_layer(covs[i], means[i], hs[i], decays[i], centered);
  }
  return accepted;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) {
  m.impl("covariance", TORCH_BOX(&covariance));
  m.impl("covariance_", TORCH_BOX(&covariance_));
  m.impl("covariance_list_", TORCH_BOX(&covariance_list));
}

}  // namespace fused_so
