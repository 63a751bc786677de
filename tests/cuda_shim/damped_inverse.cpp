// The CUDA kernels of damped_inverse behind a C interface, for tests/cuda.
#include "cuda/damped_inverse.cuh"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string_view>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class S, class T>
int run(const void* a, const void* damping, void* inverse, int32_t* info, void* panels,
        int32_t* orders, int64_t batch, int64_t d) {
  const auto* matrices = static_cast<const S*>(a);
  const fused_so::DampedInverse<T> p{static_cast<const T*>(damping),
                                     static_cast<T*>(inverse),
                                     info,
                                     static_cast<T*>(panels),
                                     orders,
                                     batch,
                                     d};
  const int64_t entries = fused_so::panel_entries(batch, d);
  // Nothing above the diagonal.
  for (int64_t row = 0; row < batch * d; ++row) {
    cuda_shim::input("a", matrices + row * d, row % d + 1);
  }
  cuda_shim::input("damping", p.damping, batch);
  cuda_shim::output("inverse", p.inverse, batch * d * d);
  cuda_shim::output("info", info, batch);
  cuda_shim::output("panels", p.panels, entries);
  cuda_shim::output("orders", orders, entries == 0 ? 0 : batch);
  const cudaError_t status = fused_so::launch_damped_inverse(matrices, p, nullptr);
  cuda_shim::forget();
  return status;
}

}  // namespace

extern "C" int64_t panel_entries(int64_t batch, int64_t d) {
  return fused_so::panel_entries(batch, d);
}

// dtype: of a, "half", "bfloat16", "float" or "double". Returns a cudaError_t.
extern "C" int damped_inverse(const char* dtype, const void* a, const void* damping, void* inverse,
                              int32_t* info, void* panels, int32_t* orders, int64_t batch,
                              int64_t d) {
  const std::string_view name = dtype;
  const auto call = [&](auto function) {
    return function(a, damping, inverse, info, panels, orders, batch, d);
  };
  if (name == "half") return call(run<Half, float>);
  if (name == "bfloat16") return call(run<BFloat16, float>);
  if (name == "float") return call(run<float, float>);
  if (name == "double") return call(run<double, double>);
  return -1;
}
