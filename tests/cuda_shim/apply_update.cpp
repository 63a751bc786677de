// The CUDA kernel of apply_update_ behind a C interface, for tests/ops/test_apply_update.py.
#include "cuda/apply_update.cuh"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>
#include <vector>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class P, class U, class A>
int run(int64_t count, void** params, void** updates, void** buffers, const int64_t* sizes,
        const double* rule, const void* scale) {
  std::vector<fused_so::TensorUpdate<P, U, A>> tensors;
  for (int64_t t = 0; t < count; ++t) {
    tensors.push_back({static_cast<P*>(params[t]), static_cast<const U*>(updates[t]),
                       static_cast<A*>(buffers == nullptr ? nullptr : buffers[t]), sizes[t]});
    cuda_shim::input_and_output("params", tensors.back().param, sizes[t]);
    cuda_shim::input("updates", tensors.back().update, sizes[t]);
    if (buffers != nullptr) cuda_shim::input_and_output("buffers", tensors.back().buffer, sizes[t]);
  }
  if (scale != nullptr) cuda_shim::input("scale", static_cast<const A*>(scale), 1);
  const fused_so::UpdateRule<A> update_rule{static_cast<A>(rule[0]), static_cast<A>(rule[1]),
                                            static_cast<A>(rule[2]), rule[3] != 0};
  const cudaError_t status = fused_so::launch_apply_update(tensors.data(), count, update_rule,
                                                           static_cast<const A*>(scale), nullptr);
  cuda_shim::forget();
  return status;
}

}  // namespace

// dtypes: of params and updates, "half", "bfloat16", "float" or "double", with a comma between.
// Returns a cudaError_t.
extern "C" int apply_update(const char* dtypes, int64_t count, void** params, void** updates,
                            void** buffers, const int64_t* sizes, const double* rule,
                            const void* scale) {
  const std::string types = dtypes;
  const auto call = [&](auto function) {
    return function(count, params, updates, buffers, sizes, rule, scale);
  };
  if (types == "half,half") return call(run<Half, Half, float>);
  if (types == "half,float") return call(run<Half, float, float>);
  if (types == "bfloat16,bfloat16") return call(run<BFloat16, BFloat16, float>);
  if (types == "bfloat16,float") return call(run<BFloat16, float, float>);
  if (types == "float,float") return call(run<float, float, float>);
  if (types == "double,double") return call(run<double, double, double>);
  return -1;
}
