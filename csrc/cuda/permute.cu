// moesys::permute, unpermute and their backwards. T tokens, K slots each (slot t*K+k), N rows, D
// model. Everything is gathered, and sums run in a fixed order: results are bit-equal from run to
// run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cassert>
#include <tuple>

#include "../checks.h"
#include "launch.cuh"

namespace moesys {
namespace {

// rows[n] = x[slot_of_row[n] / K], or zeros; `width` units of type Unit per row.
template <typename Unit>
__global__ void copy_rows(const Unit* __restrict__ x, const int64_t* __restrict__ slot_of_row,
                          Unit* __restrict__ rows, int64_t num_slots, int64_t K, int64_t width,
                          int64_t N) {
  const int64_t n = warp_index();
  if (n >= N) return;
  const int64_t slot = slot_of_row[n];
  assert(slot >= -1 && slot < num_slots);
  Unit* to = rows + n * width;
  if (slot < 0) {
    for (int64_t i = lane_index(); i < width; i += WARP) to[i] = Unit{};
    return;
  }
  const Unit* from = x + slot / K * width;
#pragma unroll 4
  for (int64_t i = lane_index(); i < width; i += WARP) to[i] = from[i];
}

// x[t] = sum_k weights[t, k] * rows[row_of_slot[t, k]]; weights of 1 where `weights` is null.
template <typename T, int W>
__global__ void combine_rows(const T* __restrict__ rows,
                             const accumulator_t<T>* __restrict__ weights,
                             const int64_t* __restrict__ row_of_slot, T* __restrict__ x, int64_t K,
                             int64_t N, int64_t D, int64_t num_tokens) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t t = warp_index();
  if (t >= num_tokens) return;
  for (int64_t i = lane_index(); i < D / W; i += WARP) {
    A sums[W] = {};
#pragma unroll 4
    for (int64_t s = t * K; s < (t + 1) * K; ++s) {
      const int64_t n = row_of_slot[s];
      assert(n >= -1 && n < N);
      if (n < 0) continue;
      const A weight = weights ? weights[s] : A(1);
      const Packed row = reinterpret_cast<const Packed*>(rows + n * D)[i];
#pragma unroll
      for (int j = 0; j < W; ++j) sums[j] += weight * static_cast<A>(row.value[j]);
    }
    Packed out;
#pragma unroll
    for (int j = 0; j < W; ++j) out.value[j] = static_cast<T>(sums[j]);
    reinterpret_cast<Packed*>(x + t * D)[i] = out;
  }
}

// One warp per slot: grad_row = weight * grad_x[t], grad_weight = <grad_x[t], row>.
template <typename T, int W>
__global__ void combine_gradients(const T* __restrict__ grad_x, const T* __restrict__ rows,
                                  const accumulator_t<T>* __restrict__ weights,
                                  const int64_t* __restrict__ row_of_slot,
                                  T* __restrict__ grad_rows,
                                  accumulator_t<T>* __restrict__ grad_weights,
                                  uint8_t* __restrict__ is_used, int64_t K, int64_t N, int64_t D,
                                  int64_t num_slots) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t s = warp_index();
  if (s >= num_slots) return;
  const int64_t n = row_of_slot[s];
  assert(n >= -1 && n < N);
  A dot = 0;
  if (n >= 0) {
    const A weight = weights[s];
    const auto* from = reinterpret_cast<const Packed*>(rows + n * D);
    const auto* grad = reinterpret_cast<const Packed*>(grad_x + s / K * D);
    auto* to = reinterpret_cast<Packed*>(grad_rows + n * D);
#pragma unroll 2
    for (int64_t i = lane_index(); i < D / W; i += WARP) {
      const Packed row = from[i], dx = grad[i];
      Packed out;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const A value = static_cast<A>(dx.value[j]);
        dot += value * static_cast<A>(row.value[j]);
        out.value[j] = static_cast<T>(weight * value);
      }
      to[i] = out;
    }
    for (int offset = WARP / 2; offset > 0; offset /= 2)
      dot += __shfl_xor_sync(ALL_LANES, dot, offset);
  }
  if (lane_index() == 0) {
    grad_weights[s] = dot;
    if (n >= 0) is_used[n] = 1;
  }
}

// Rows that serve no slot have a gradient of zero.
template <typename T>
__global__ void zero_unused(const uint8_t* __restrict__ is_used, T* __restrict__ rows, int64_t D,
                            int64_t N) {
  const int64_t n = warp_index();
  if (n >= N || is_used[n]) return;
  for (int64_t d = lane_index(); d < D; d += WARP) rows[n * D + d] = static_cast<T>(0.0f);
}

// Any element type travels: the unit of copying is the largest that rows and pointers allow.
Tensor permute(const Tensor& x_any, const Tensor& slot_of_row_any, const Tensor& row_of_slot) {
  const Slots slots = check_permute(x_any, slot_of_row_any, row_of_slot);
  const Launch launch(x_any);
  const auto [x, slot_of_row] = contiguous(x_any, slot_of_row_any);
  const int64_t N = slot_of_row.size(0);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor rows = torch::stable::new_empty(x, {N, x.size(1)});
  const void* from = x.const_data_ptr();
  void* to = rows.mutable_data_ptr();
  const auto copy = [&]<typename Unit>() {
    constexpr int64_t bytes = sizeof(Unit);
    if (row_bytes % bytes || !is_aligned(from, bytes) || !is_aligned(to, bytes)) return false;
    launch.warp_per_item(&copy_rows<Unit>, N, static_cast<const Unit*>(from),
                         slot_of_row.const_data_ptr<int64_t>(), static_cast<Unit*>(to),
                         slots.T * slots.K, slots.K, row_bytes / bytes);
    return true;
  };
  copy.template operator()<uint4>() || copy.template operator()<uint32_t>() ||
      copy.template operator()<uint16_t>() || copy.template operator()<uint8_t>();
  return rows;
}

template <typename T>
void combine(const Launch& launch, const Tensor& rows, const accumulator_t<T>* weights,
             const Tensor& row_of_slot, Tensor& x) {
  const int64_t K = row_of_slot.size(1), N = rows.size(0), D = rows.size(1);
  const T* from = rows.const_data_ptr<T>();
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();
  T* to = x.mutable_data_ptr<T>();
  for_pack_width<T>(
      D,
      [&]<int W>() {
        launch.warp_per_item(&combine_rows<T, W>, x.size(0), from, weights, row_of, to, K, N, D);
      },
      from, to);
}

Tensor permute_backward(const Tensor& grad_rows_any, const Tensor& row_of_slot_any) {
  const Slots slots = check_row_of_slot("permute_backward", row_of_slot_any);
  STD_TORCH_CHECK(grad_rows_any.dim() == 2, "permute_backward: grad_rows must be [N, D]");
  const Launch launch(grad_rows_any);
  const auto [grad_rows, row_of_slot] = contiguous(grad_rows_any, row_of_slot_any);
  Tensor grad_x = torch::stable::new_empty(grad_rows, {slots.T, grad_rows.size(1)});
  for_float_type("permute_backward", grad_rows, [&]<typename T>() {
    combine<T>(launch, grad_rows, nullptr, row_of_slot, grad_x);
  });
  return grad_x;
}

Tensor unpermute(const Tensor& rows_any, const Tensor& weights_any, const Tensor& row_of_slot_any) {
  const Slots slots = check_unpermute("unpermute", rows_any, weights_any, row_of_slot_any);
  const Launch launch(rows_any);
  const auto [rows, weights, row_of_slot] = contiguous(rows_any, weights_any, row_of_slot_any);
  Tensor x = torch::stable::new_empty(rows, {slots.T, rows.size(1)});
  for_float_type("unpermute", rows, [&]<typename T>() {
    combine<T>(launch, rows, weights.const_data_ptr<accumulator_t<T>>(), row_of_slot, x);
  });
  return x;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_x_any, const Tensor& rows_any,
                                              const Tensor& weights_any,
                                              const Tensor& row_of_slot_any) {
  const char* op = "unpermute_backward";
  const Slots slots = check_unpermute(op, rows_any, weights_any, row_of_slot_any);
  const int64_t N = rows_any.size(0), D = rows_any.size(1), K = slots.K;
  check_like(op, grad_x_any, slots.T, D, rows_any);
  const Launch launch(rows_any);
  const auto [grad_x, rows, weights, row_of_slot] =
      contiguous(grad_x_any, rows_any, weights_any, row_of_slot_any);
  Tensor grad_rows = torch::stable::new_empty(rows, {N, D});
  Tensor grad_weights = torch::stable::new_empty(weights, {slots.T, K});
  Tensor is_used = torch::stable::new_zeros(rows, {N}, ScalarType::Byte);
  for_float_type(op, rows, [&]<typename T>() {
    const T* dx = grad_x.const_data_ptr<T>();
    const T* from = rows.const_data_ptr<T>();
    T* drows = grad_rows.mutable_data_ptr<T>();
    uint8_t* used = is_used.mutable_data_ptr<uint8_t>();
    for_pack_width<T>(
        D,
        [&]<int W>() {
          launch.warp_per_item(&combine_gradients<T, W>, slots.T * K, dx, from,
                               weights.const_data_ptr<accumulator_t<T>>(),
                               row_of_slot.const_data_ptr<int64_t>(), drows,
                               grad_weights.mutable_data_ptr<accumulator_t<T>>(), used, K, N, D);
        },
        dx, from, drows);
    launch.warp_per_item(&zero_unused<T>, N, static_cast<const uint8_t*>(used), drows, D);
  });
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
  m.impl("unpermute", TORCH_BOX(&unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward));
}

}  // namespace moesys
