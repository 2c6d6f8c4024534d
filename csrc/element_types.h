// Element types of the ops: fp32, fp64, bf16 and fp16, each with the type its sums are kept in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace moesys {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp64 sums in fp64, everything else in fp32.
template <typename T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// In which torch adds a `Part` to a `Total`.
template <typename Part, typename Total>
using sum_t = std::conditional_t<std::is_same_v<Part, double>, double, accumulator_t<Total>>;

template <typename T>
inline constexpr ScalarType scalar_type_of = std::is_same_v<T, double>    ? ScalarType::Double
                                             : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                                          : ScalarType::Float;

// Calls kernel.template operator()<T>() with this element type.
template <typename Kernel>
auto for_float_type(const char* op, ScalarType type, const Kernel& kernel) {
  switch (type) {
    case ScalarType::Float:
      return kernel.template operator()<float>();
    case ScalarType::Double:
      return kernel.template operator()<double>();
    case ScalarType::BFloat16:
      return kernel.template operator()<c10::BFloat16>();
    case ScalarType::Half:
      return kernel.template operator()<c10::Half>();
    default:
      STD_TORCH_CHECK(false, op, ": needs fp32, fp64, bf16 or fp16 elements");
  }
  __builtin_unreachable();
}

template <typename Kernel>
auto for_float_type(const char* op, const Tensor& tensor, const Kernel& kernel) {
  return for_float_type(op, tensor.scalar_type(), kernel);
}

// Calls kernel.template operator()<Id>() with int64_t or int32_t.
template <typename Kernel>
auto for_id_type(const char* op, const Tensor& ids, const Kernel& kernel) {
  switch (ids.scalar_type()) {
    case ScalarType::Long:
      return kernel.template operator()<int64_t>();
    case ScalarType::Int:
      return kernel.template operator()<int32_t>();
    default:
      STD_TORCH_CHECK(false, op, ": expert ids must be int64 or int32");
  }
  __builtin_unreachable();
}

}  // namespace moesys
