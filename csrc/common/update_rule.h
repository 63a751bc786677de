// One element of a parameter update, the same on every device.
#pragma once

#ifdef __CUDACC__
#define FUSED_SO_HOST_DEVICE __host__ __device__
#else
#define FUSED_SO_HOST_DEVICE
#endif

namespace fused_so {

template <class A>
struct UpdateRule {
  A lr;
  A momentum;
  A weight_decay;
  bool nesterov;

  // u = s Delta + lambda p;  v <- mu v + u;  returns p - eta (u + mu v if nesterov, else v).
  // Without momentum there is no v, and buffer may be null.
  FUSED_SO_HOST_DEVICE A operator()(A param, A update, A scale, A* buffer) const {
    A step = scale * update + weight_decay * param;
    if (buffer != nullptr) {
      const A velocity = momentum * *buffer + step;
      *buffer = velocity;
      step = nesterov ? step + momentum * velocity : velocity;
    }
    return param - lr * step;
  }
};

}  // namespace fused_so
