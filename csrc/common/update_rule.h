// One element of a parameter update, or a vector of them, the same on every device.
#pragma once

#ifdef __CUDACC__
#define FUSED_SO_HOST_DEVICE __host__ __device__
#else
// No copy of it outside its callers, which are compiled for different processors.
#define FUSED_SO_HOST_DEVICE __attribute__((always_inline))
#endif

namespace fused_so {

template <class A>
struct UpdateRule {
  A lr;
  A momentum;
  A weight_decay;
  bool nesterov;

  // u = s Delta + lambda p;  v <- mu v + u;  returns p - eta (u + mu v if nesterov, else v).
  // Without momentum there is no v. X is A or a vector of A.
  template <class X>
  FUSED_SO_HOST_DEVICE X operator()(X param, X update, A scale, X* buffer = nullptr) const {
    X step = scale * update + weight_decay * param;
    if (buffer != nullptr) {
      const X velocity = momentum * *buffer + step;
      *buffer = velocity;
      step = nesterov ? step + momentum * velocity : velocity;
    }
    return param - lr * step;
  }
};

}  // namespace fused_so
