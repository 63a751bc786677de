// (A + damping I)^-1 of symmetric positive definite matrices: the host side.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/dispatch.h"
#include "cuda/current_stream.h"
#include "cuda/damped_inverse.cuh"

namespace fused_so {
namespace {

std::tuple<Tensor, Tensor> damped_inverse(Tensor a, Tensor damping) {
  const int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ScalarType type = accumulate_type(a.scalar_type());
  Tensor inverse = torch::stable::new_empty(a, a.sizes(), type);
  Tensor info = torch::stable::new_empty(a, damping.sizes(), ScalarType::Int);
  const int64_t batch = info.numel(), d = a.size(-1);
  if (batch == 0) return {inverse, info};
  if (d == 0) return {inverse, torch::stable::zero_(info)};

  if (!a.is_contiguous()) a = torch::stable::contiguous(a);
  if (!damping.is_contiguous()) damping = torch::stable::contiguous(damping);
  const int64_t entries = panel_entries(batch, d);
  Tensor panels = torch::stable::new_empty(a, {entries}, type);
  Tensor orders = torch::stable::new_empty(a, {entries == 0 ? 0 : batch}, ScalarType::Int);
  const cudaError_t status = with_type(a.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const DampedInverse<T> pointers{read<T>(damping),
                                    write<T>(inverse),
                                    write<int32_t>(info),
                                    write<T>(panels),
                                    write<int32_t>(orders),
                                    batch,
                                    d};
    return launch_damped_inverse(read<S>(a), pointers, current_stream(device));
  });
  STD_TORCH_CHECK(status == cudaSuccess, "damped_inverse: ", cudaGetErrorString(status));
  return {inverse, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CUDA, m) {
  m.impl("damped_inverse", TORCH_BOX(&damped_inverse));
}

}  // namespace fused_so
