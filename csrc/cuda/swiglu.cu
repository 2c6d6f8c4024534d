// moesys::swiglu and its backward. N rows, F hidden columns; gate_up is [gate | up].
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../swiglu.h"
#include "launch.cuh"

namespace moesys {
namespace {

template <typename T, int W>
__global__ void forward(const T* __restrict__ gate_up, T* __restrict__ hidden, int64_t F,
                        int64_t N) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t n = warp_index();
  if (n >= N) return;
  const auto* gate = reinterpret_cast<const Packed*>(gate_up + n * 2 * F);
  const auto* up = reinterpret_cast<const Packed*>(gate_up + n * 2 * F + F);
  auto* out = reinterpret_cast<Packed*>(hidden + n * F);
#pragma unroll 2
  for (int64_t i = lane_index(); i < F / W; i += WARP) {
    const Packed g = gate[i], u = up[i];
    Packed h;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      h.value[j] =
          static_cast<T>(swiglu_forward(static_cast<A>(g.value[j]), static_cast<A>(u.value[j])));
    }
    out[i] = h;
  }
}

template <typename T, int W>
__global__ void backward(const T* __restrict__ grad_hidden, const T* __restrict__ gate_up,
                         T* __restrict__ grad_gate_up, int64_t F, int64_t N) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t n = warp_index();
  if (n >= N) return;
  const auto* grad = reinterpret_cast<const Packed*>(grad_hidden + n * F);
  const auto* gate = reinterpret_cast<const Packed*>(gate_up + n * 2 * F);
  const auto* up = reinterpret_cast<const Packed*>(gate_up + n * 2 * F + F);
  auto* grad_gate = reinterpret_cast<Packed*>(grad_gate_up + n * 2 * F);
  auto* grad_up = reinterpret_cast<Packed*>(grad_gate_up + n * 2 * F + F);
#pragma unroll 2
  for (int64_t i = lane_index(); i < F / W; i += WARP) {
    const Packed d = grad[i], g = gate[i], u = up[i];
    Packed dg, du;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const auto out = swiglu_gradient(static_cast<A>(d.value[j]), static_cast<A>(g.value[j]),
                                       static_cast<A>(u.value[j]));
      dg.value[j] = static_cast<T>(out.gate);
      du.value[j] = static_cast<T>(out.up);
    }
    grad_gate[i] = dg;
    grad_up[i] = du;
  }
}

Tensor swiglu(const Tensor& gate_up_any) {
  const int64_t F = check_gate_up("swiglu", gate_up_any);
  const Launch launch(gate_up_any);
  const Tensor gate_up = torch::stable::contiguous(gate_up_any);
  const int64_t N = gate_up.size(0);
  Tensor hidden = torch::stable::new_empty(gate_up, {N, F});
  for_float_type("swiglu", gate_up, [&]<typename T>() {
    const T* in = gate_up.const_data_ptr<T>();
    T* out = hidden.mutable_data_ptr<T>();
    for_pack_width<T>(
        F, [&]<int W>() { launch.warp_per_item(&forward<T, W>, N, in, out, F); }, in, out);
  });
  return hidden;
}

Tensor swiglu_backward(const Tensor& grad_hidden_any, const Tensor& gate_up_any) {
  const int64_t F = check_gate_up("swiglu_backward", gate_up_any);
  check_like("swiglu_backward", grad_hidden_any, gate_up_any.size(0), F, gate_up_any);
  const Launch launch(gate_up_any);
  const auto [grad_hidden, gate_up] = contiguous(grad_hidden_any, gate_up_any);
  const int64_t N = gate_up.size(0);
  Tensor grad_gate_up = torch::stable::new_empty(gate_up, {N, 2 * F});
  for_float_type("swiglu_backward", gate_up, [&]<typename T>() {
    const T* grad = grad_hidden.const_data_ptr<T>();
    const T* in = gate_up.const_data_ptr<T>();
    T* out = grad_gate_up.mutable_data_ptr<T>();
    for_pack_width<T>(
        F, [&]<int W>() { launch.warp_per_item(&backward<T, W>, N, grad, in, out, F); }, grad, in,
        out);
  });
  return grad_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace moesys
