// The whole parameter update of many tensors in one launch: the host side.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/lists.h"
#include "cuda/apply_update.cuh"
#include "cuda/current_stream.h"

namespace fused_so {
namespace {

template <class P, class U>
cudaError_t update_all(const std::vector<Tensor>& params, const std::vector<Tensor>& updates,
                       const std::vector<Tensor>& buffers, UpdateRule<Accumulate<P>> rule,
                       const Accumulate<P>* scale, cudaStream_t stream) {
  using A = Accumulate<P>;
  std::vector<TensorUpdate<P, U, A>> tensors;
  for (size_t t = 0; t < params.size(); ++t) {
    if (params[t].numel() == 0) continue;
    tensors.push_back({write<P>(params[t]), read<U>(updates[t]),
                       buffers.empty() ? nullptr : write<A>(buffers[t]), params[t].numel()});
  }
  return launch_apply_update(tensors.data(), static_cast<int64_t>(tensors.size()), rule, scale,
                             stream);
}

void apply_update(std::vector<Tensor> params, std::vector<Tensor> updates,
                  std::vector<Tensor> momentum_buffers, double lr, double momentum,
                  double weight_decay, bool nesterov, std::optional<Tensor> scale) {
  check_entries("apply_update_", "updates", updates, params.size());
  check_entries("apply_update_", "momentum_buffers", momentum_buffers,
                momentum == 0 ? 0 : params.size());
  if (params.empty()) return;
  const int32_t device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  for (Tensor& update : updates) {
    if (!update.is_contiguous()) update = torch::stable::contiguous(update);
  }
  const cudaError_t status = with_type(params[0].scalar_type(), [&](auto param_tag) {
    using P = typename decltype(param_tag)::type;
    using A = Accumulate<P>;
    const UpdateRule<A> rule{static_cast<A>(lr), static_cast<A>(momentum),
                             static_cast<A>(weight_decay), nesterov};
    const A* factor = scale ? read<A>(*scale) : nullptr;
    const cudaStream_t stream = current_stream(device);
    if (updates[0].scalar_type() == params[0].scalar_type()) {
      return update_all<P, P>(params, updates, momentum_buffers, rule, factor, stream);
    }
    return update_all<P, A>(params, updates, momentum_buffers, rule, factor, stream);
  });
  STD_TORCH_CHECK(status == cudaSuccess, "apply_update_: ", cudaGetErrorString(status));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CUDA, m) { m.impl("apply_update_", TORCH_BOX(&apply_update)); }

}  // namespace fused_so
