// moesys::swiglu and its backward. N rows, F hidden columns; gate_up is [gate | up].
#include "../swiglu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "simd.h"

namespace moesys {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 16384;

template <typename T>
inline __attribute__((always_inline)) void forward_row(const T* __restrict gate_up,
                                                       T* __restrict hidden, int64_t F) {
#pragma omp simd
  for (int64_t f = 0; f < F; ++f) {
    hidden[f] = narrow<T>(swiglu_forward(widen(gate_up[f]), widen(gate_up[F + f])));
  }
}

template <typename T>
inline __attribute__((always_inline)) void backward_row(const T* __restrict grad_hidden,
                                                        const T* __restrict gate_up,
                                                        T* __restrict grad_gate_up, int64_t F) {
#pragma omp simd
  for (int64_t f = 0; f < F; ++f) {
    const auto grad =
        swiglu_gradient(widen(grad_hidden[f]), widen(gate_up[f]), widen(gate_up[F + f]));
    grad_gate_up[f] = narrow<T>(grad.gate);
    grad_gate_up[F + f] = narrow<T>(grad.up);
  }
}

#define MOESYS_ROWS(T)                                                                      \
  MOESYS_SIMD void forward_rows(const T* gate_up, T* hidden, int64_t rows, int64_t F) {     \
    for (int64_t n = 0; n < rows; ++n) forward_row(gate_up + n * 2 * F, hidden + n * F, F); \
  }                                                                                         \
  MOESYS_SIMD void backward_rows(const T* grad_hidden, const T* gate_up, T* grad_gate_up,   \
                                 int64_t rows, int64_t F) {                                 \
    for (int64_t n = 0; n < rows; ++n)                                                      \
      backward_row(grad_hidden + n * F, gate_up + n * 2 * F, grad_gate_up + n * 2 * F, F);  \
  }
MOESYS_ROWS(float)
MOESYS_ROWS(double)
MOESYS_ROWS(c10::BFloat16)
MOESYS_ROWS(c10::Half)
#undef MOESYS_ROWS

int64_t grain_rows(int64_t F) { return GRAIN_ELEMENTS / (F + 1) + 1; }

Tensor swiglu(const Tensor& gate_up_any) {
  const int64_t F = check_gate_up("swiglu", gate_up_any);
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const int64_t N = gate_up.size(0);
  Tensor hidden = torch::stable::new_empty(gate_up, {N, F});
  for_float_type("swiglu", gate_up, [&]<typename T>() {
    const T* in = gate_up.const_data_ptr<T>();
    T* out = hidden.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, N, grain_rows(F), [&](int64_t begin, int64_t end) {
      forward_rows(in + begin * 2 * F, out + begin * F, end - begin, F);
    });
  });
  return hidden;
}

Tensor swiglu_backward(const Tensor& grad_hidden_any, const Tensor& gate_up_any) {
  const int64_t F = check_gate_up("swiglu_backward", gate_up_any);
  check_like("swiglu_backward", grad_hidden_any, gate_up_any.size(0), F, gate_up_any);
  const auto [grad_hidden, gate_up] = contiguous(grad_hidden_any, gate_up_any);
  const int64_t N = gate_up.size(0);
  Tensor grad_gate_up = torch::stable::new_empty(gate_up, {N, 2 * F});
  for_float_type("swiglu_backward", gate_up, [&]<typename T>() {
    const T* grad = grad_hidden.const_data_ptr<T>();
    const T* in = gate_up.const_data_ptr<T>();
    T* out = grad_gate_up.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, N, grain_rows(F), [&](int64_t begin, int64_t end) {
      backward_rows(grad + begin * F, in + begin * 2 * F, out + begin * 2 * F, end - begin, F);
    });
  });
  return grad_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace moesys
