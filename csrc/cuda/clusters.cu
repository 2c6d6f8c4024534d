// moesys::cross_polytope, member_means, restore and restore's backward. T tokens, K slots each
// (slot t*K+k), C rows (clusters), M members (slots that have a row, in order of row), D model, H
// hashes of V dimensions. Everything is gathered, and sums run in a fixed order: results are
// bit-equal from run to run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cassert>
#include <tuple>

#include "../checks.h"
#include "../restored.h"
#include "launch.cuh"

namespace moesys {
namespace {

// One warp per row and hash: the place and sign of its largest entry, the first of equals.
template <typename T>
__global__ void vertices(const T* __restrict__ turned, int64_t* __restrict__ codes, int64_t V,
                         int64_t num_rows) {
  using A = accumulator_t<T>;
  const int64_t i = warp_index();
  if (i >= num_rows) return;
  A largest = -1;
  int64_t code = 0;
  for (int64_t v = lane_index(); v < V; v += WARP) {
    const A value = static_cast<A>(turned[i * V + v]);
    const A size = value < 0 ? -value : value;
    assert(isfinite(size));
    if (size > largest) {
      largest = size;
      code = vertex_code(v, value);
    }
  }
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const A size = __shfl_xor_sync(ALL_LANES, largest, offset);
    const int64_t other = __shfl_xor_sync(ALL_LANES, code, offset);
    if (size > largest || (size == largest && other < code)) {
      largest = size;
      code = other;
    }
  }
  if (lane_index() == 0) codes[i] = code;
}

// out[c] = sum over its members of weights[slot] * x[slot / K] (weights of 1 where `weights` is
// null), divided by their number where `is_mean`. One warp per row and WARP * W columns: few rows
// of many members each keep the device busy too.
template <typename T, int W>
__global__ void gather_members(const T* __restrict__ x, const int64_t* __restrict__ member_slots,
                               const int64_t* __restrict__ first_member,
                               const accumulator_t<T>* __restrict__ weights, T* __restrict__ out,
                               int64_t K, int64_t D, int64_t num_slots, bool is_mean,
                               int64_t num_tiles, int64_t num_items) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t item = warp_index(), c = item / num_tiles;
  const int64_t i = item % num_tiles * WARP + lane_index();
  if (item >= num_items || i >= D / W) return;
  const int64_t begin = first_member[c], end = first_member[c + 1];
  const A count = is_mean && end > begin ? static_cast<A>(end - begin) : A(1);
  A sums[W] = {};
#pragma unroll 4
  for (int64_t m = begin; m < end; ++m) {
    const int64_t slot = member_slots[m];
    assert(slot >= 0 && slot < num_slots);
    const A weight = weights ? weights[slot] : A(1);
    const Packed row = reinterpret_cast<const Packed*>(x + slot / K * D)[i];
#pragma unroll
    for (int j = 0; j < W; ++j) sums[j] += weight * static_cast<A>(row.value[j]);
  }
  Packed result;
#pragma unroll
  for (int j = 0; j < W; ++j) result.value[j] = static_cast<T>(sums[j] / count);
  reinterpret_cast<Packed*>(out + c * D)[i] = result;
}

// y[t] = sum_k weights[t, k] * (rows[c] + slopes[c] * (x[t] - means[c])).
template <typename T, int W>
__global__ void restore_tokens(const T* __restrict__ rows, const T* __restrict__ means,
                               const T* __restrict__ x,
                               const accumulator_t<T>* __restrict__ weights,
                               const accumulator_t<T>* __restrict__ slopes,
                               const int64_t* __restrict__ row_of_slot, T* __restrict__ y,
                               int64_t K, int64_t C, int64_t D, int64_t num_tokens) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t t = warp_index();
  if (t >= num_tokens) return;
  for (int64_t i = lane_index(); i < D / W; i += WARP) {
    A sums[W] = {};
    const Packed token = reinterpret_cast<const Packed*>(x + t * D)[i];
#pragma unroll 2
    for (int64_t s = t * K; s < (t + 1) * K; ++s) {
      const int64_t c = row_of_slot[s];
      assert(c >= -1 && c < C);
      if (c < 0) continue;
      const A weight = weights[s], slope = slopes[c];
      const Packed row = reinterpret_cast<const Packed*>(rows + c * D)[i];
      const Packed mean = reinterpret_cast<const Packed*>(means + c * D)[i];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        sums[j] += weight * restored(static_cast<A>(row.value[j]), slope,
                                     static_cast<A>(token.value[j]), static_cast<A>(mean.value[j]));
      }
    }
    Packed result;
#pragma unroll
    for (int j = 0; j < W; ++j) result.value[j] = static_cast<T>(sums[j]);
    reinterpret_cast<Packed*>(y + t * D)[i] = result;
  }
}

// grad_weights[s] = <grad[t], rows[c] + slopes[c] * (x[t] - means[c])>, one warp per slot.
template <typename T, int W>
__global__ void slot_gradients(const T* __restrict__ grad, const T* __restrict__ rows,
                               const T* __restrict__ means, const T* __restrict__ x,
                               const accumulator_t<T>* __restrict__ slopes,
                               const int64_t* __restrict__ row_of_slot,
                               accumulator_t<T>* __restrict__ grad_weights, int64_t K, int64_t C,
                               int64_t D, int64_t num_slots) {
  using A = accumulator_t<T>;
  using Packed = Pack<T, W>;
  const int64_t s = warp_index();
  if (s >= num_slots) return;
  const int64_t c = row_of_slot[s], t = s / K;
  assert(c >= -1 && c < C);
  A dot = 0;
  if (c >= 0) {
    const A slope = slopes[c];
    for (int64_t i = lane_index(); i < D / W; i += WARP) {
      const Packed dy = reinterpret_cast<const Packed*>(grad + t * D)[i];
      const Packed token = reinterpret_cast<const Packed*>(x + t * D)[i];
      const Packed row = reinterpret_cast<const Packed*>(rows + c * D)[i];
      const Packed mean = reinterpret_cast<const Packed*>(means + c * D)[i];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        dot += static_cast<A>(dy.value[j]) * restored(static_cast<A>(row.value[j]), slope,
                                                      static_cast<A>(token.value[j]),
                                                      static_cast<A>(mean.value[j]));
      }
    }
    for (int offset = WARP / 2; offset > 0; offset /= 2)
      dot += __shfl_xor_sync(ALL_LANES, dot, offset);
  }
  if (lane_index() == 0) grad_weights[s] = dot;
}

// grad_x[t] = grad[t] * sum_k weights[t, k] * slopes[c].
template <typename T>
__global__ void token_gradients(const T* __restrict__ grad,
                                const accumulator_t<T>* __restrict__ weights,
                                const accumulator_t<T>* __restrict__ slopes,
                                const int64_t* __restrict__ row_of_slot, T* __restrict__ grad_x,
                                int64_t K, int64_t D, int64_t num_tokens) {
  using A = accumulator_t<T>;
  const int64_t t = warp_index();
  if (t >= num_tokens) return;
  A slope = 0;
  for (int64_t s = t * K; s < (t + 1) * K; ++s)
    if (row_of_slot[s] >= 0) slope += weights[s] * slopes[row_of_slot[s]];
  for (int64_t d = lane_index(); d < D; d += WARP)
    grad_x[t * D + d] = static_cast<T>(slope * static_cast<A>(grad[t * D + d]));
}

Tensor cross_polytope(const Tensor& turned_any) {
  check_turned(turned_any);
  const Launch launch(turned_any);
  const Tensor turned = torch::stable::contiguous(turned_any);
  const int64_t T = turned.size(0), H = turned.size(1), V = turned.size(2);
  Tensor codes = torch::stable::new_empty(turned, {T, H}, ScalarType::Long);
  for_float_type("cross_polytope", turned, [&]<typename Element>() {
    launch.warp_per_item(&vertices<Element>, T * H, turned.const_data_ptr<Element>(),
                         codes.mutable_data_ptr<int64_t>(), V);
  });
  return codes;
}

// Also the gradient of rows: with weights and no mean.
template <typename T>
void gather(const Launch& launch, const Tensor& x, const Tensor& members, const Tensor& first,
            const accumulator_t<T>* weights, bool is_mean, const Clusters& sizes, Tensor& out) {
  const int64_t D = x.size(1);
  const T* from = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  for_pack_width<T>(
      D,
      [&]<int W>() {
        const int64_t num_tiles = (D / W + WARP - 1) / WARP;
        launch.warp_per_item(&gather_members<T, W>, sizes.C * num_tiles, from,
                             members.const_data_ptr<int64_t>(), first.const_data_ptr<int64_t>(),
                             weights, to, sizes.K, D, sizes.T * sizes.K, is_mean, num_tiles);
      },
      from, to);
}

Tensor member_means(const Tensor& x_any, const Tensor& row_of_slot_any, const Tensor& members_any,
                    const Tensor& first_any) {
  const Clusters sizes =
      check_clusters("member_means", x_any, row_of_slot_any, members_any, first_any);
  const Launch launch(x_any);
  const auto [x, members, first] = contiguous(x_any, members_any, first_any);
  Tensor means = torch::stable::new_empty(x, {sizes.C, x.size(1)});
  for_float_type("member_means", x, [&]<typename Element>() {
    gather<Element>(launch, x, members, first, nullptr, true, sizes, means);
  });
  return means;
}

// The last two are the backward's.
Tensor restore(const Tensor& rows_any, const Tensor& means_any, const Tensor& x_any,
               const Tensor& weights_any, const Tensor& slopes_any, const Tensor& row_of_slot_any,
               const Tensor&, const Tensor&) {
  const Clusters sizes = check_restore("restore", rows_any, means_any, x_any, weights_any,
                                       slopes_any, row_of_slot_any);
  const Launch launch(x_any);
  const auto [rows, means, x, weights, slopes, row_of_slot] =
      contiguous(rows_any, means_any, x_any, weights_any, slopes_any, row_of_slot_any);
  const int64_t D = x.size(1);
  Tensor y = torch::stable::new_empty(x, {sizes.T, D});
  for_float_type("restore", x, [&]<typename Element>() {
    using A = accumulator_t<Element>;
    const Element* row = rows.const_data_ptr<Element>();
    const Element* mean = means.const_data_ptr<Element>();
    const Element* from = x.const_data_ptr<Element>();
    Element* to = y.mutable_data_ptr<Element>();
    for_pack_width<Element>(
        D,
        [&]<int W>() {
          launch.warp_per_item(&restore_tokens<Element, W>, sizes.T, row, mean, from,
                               weights.const_data_ptr<A>(), slopes.const_data_ptr<A>(),
                               row_of_slot.const_data_ptr<int64_t>(), to, sizes.K, sizes.C, D);
        },
        row, mean, from, to);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> restore_backward(
    const Tensor& grad_any, const Tensor& rows_any, const Tensor& means_any, const Tensor& x_any,
    const Tensor& weights_any, const Tensor& slopes_any, const Tensor& row_of_slot_any,
    const Tensor& members_any, const Tensor& first_any) {
  const char* op = "restore_backward";
  const Clusters sizes =
      check_restore_backward(op, grad_any, rows_any, means_any, x_any, weights_any, slopes_any,
                             row_of_slot_any, members_any, first_any);
  const Launch launch(x_any);
  const auto [grad, rows, means, x, weights, slopes, row_of_slot, members, first] =
      contiguous(grad_any, rows_any, means_any, x_any, weights_any, slopes_any, row_of_slot_any,
                 members_any, first_any);
  const int64_t T = sizes.T, K = sizes.K, C = sizes.C, D = x.size(1);
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();
  Tensor grad_rows = torch::stable::new_empty(rows, {C, D});
  Tensor grad_x = torch::stable::new_empty(x, {T, D});
  Tensor grad_weights = torch::stable::new_empty(weights, {T, K});
  for_float_type(op, x, [&]<typename Element>() {
    using A = accumulator_t<Element>;
    const Element* dy = grad.const_data_ptr<Element>();
    const Element* row = rows.const_data_ptr<Element>();
    const Element* mean = means.const_data_ptr<Element>();
    const Element* from = x.const_data_ptr<Element>();
    const A* weight = weights.const_data_ptr<A>();
    const A* slope = slopes.const_data_ptr<A>();
    gather<Element>(launch, grad, members, first, weight, false, sizes, grad_rows);
    launch.warp_per_item(&token_gradients<Element>, T, dy, weight, slope, row_of,
                         grad_x.mutable_data_ptr<Element>(), K, D);
    for_pack_width<Element>(
        D,
        [&]<int W>() {
          launch.warp_per_item(&slot_gradients<Element, W>, T * K, dy, row, mean, from, slope,
                               row_of, grad_weights.mutable_data_ptr<A>(), K, C, D);
        },
        dy, row, mean, from);
  });
  return {grad_rows, grad_x, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("cross_polytope", TORCH_BOX(&cross_polytope));
  m.impl("member_means", TORCH_BOX(&member_means));
  m.impl("restore", TORCH_BOX(&restore));
  m.impl("restore_backward", TORCH_BOX(&restore_backward));
}

}  // namespace moesys
