// From a runtime dtype to a C++ type, and the dtype in which it accumulates.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace fused_so {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) with the T of a floating dtype.
template <class Body>
auto with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, "fused_so: unsupported dtype ", torch::headeronly::toString(type));
  }
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fused_so
