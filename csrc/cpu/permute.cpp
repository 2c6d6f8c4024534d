// moesys::permute, unpermute and their backwards. T tokens, K slots each (slot t*K+k), N rows, D
// model.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "simd.h"
#include "tasks.h"

namespace moesys {
namespace {

// out[d] = sum_k weights[k] * rows[k][d], in the accumulator type.
template <typename T>
inline __attribute__((always_inline)) void weighted_sum(T* __restrict out, const T* const* rows,
                                                        const accumulator_t<T>* weights,
                                                        int64_t num_rows, int64_t D) {
  using A = accumulator_t<T>;
  alignas(64) A sums[TILE];
  for (int64_t start = 0; start < D; start += TILE) {
    const int64_t width = std::min(TILE, D - start);
    for (int64_t d = 0; d < width; ++d) sums[d] = A(0);
    for (int64_t k = 0; k < num_rows; ++k) {
      const T* __restrict row = rows[k] + start;
      const A weight = weights[k];
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) sums[d] += weight * widen(row[d]);
    }
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) out[start + d] = narrow<T>(sums[d]);
  }
}

// grad_row[d] = weight * grad_x[d]; returns <grad_x, row>: one pass over the three.
template <typename T>
inline __attribute__((always_inline)) accumulator_t<T> scale_and_dot(T* __restrict grad_row,
                                                                     const T* __restrict grad_x,
                                                                     const T* __restrict row,
                                                                     accumulator_t<T> weight,
                                                                     int64_t D) {
  accumulator_t<T> dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d) {
    const accumulator_t<T> grad = widen(grad_x[d]);
    dot += grad * widen(row[d]);
    grad_row[d] = narrow<T>(weight * grad);
  }
  return dot;
}

#define MOESYS_ROWS(T)                                                                     \
  MOESYS_SIMD void sum_rows(T* out, const T* const* rows, const accumulator_t<T>* weights, \
                            int64_t num_rows, int64_t D) {                                 \
    weighted_sum<T>(out, rows, weights, num_rows, D);                                      \
  }                                                                                        \
  MOESYS_SIMD accumulator_t<T> gradient_row(T* grad_row, const T* grad_x, const T* row,    \
                                            accumulator_t<T> weight, int64_t D) {          \
    return scale_and_dot<T>(grad_row, grad_x, row, weight, D);                             \
  }
MOESYS_ROWS(float)
MOESYS_ROWS(double)
MOESYS_ROWS(c10::BFloat16)
MOESYS_ROWS(c10::Half)
#undef MOESYS_ROWS

void check_index(const char* op, const char* name, const std::atomic<bool>& is_bad) {
  STD_TORCH_CHECK(!is_bad.load(), op, ": ", name,
                  " has an entry that is neither -1 nor a valid index");
}

// Byte copies, so any element type travels.
Tensor permute(const Tensor& x_any, const Tensor& slot_of_row_any, const Tensor& row_of_slot) {
  const auto [T, K] = check_permute(x_any, slot_of_row_any, row_of_slot);
  const auto [x, slot_of_row] = contiguous(x_any, slot_of_row_any);
  const int64_t N = slot_of_row.size(0), num_slots = T * K, slots_per_token = K;
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor rows = torch::stable::new_empty(x, {N, x.size(1)});
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t* slot_of = slot_of_row.const_data_ptr<int64_t>();
  std::atomic<bool> is_bad{false};
  torch::stable::parallel_for(0, N, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t slot = slot_of[n];
      if (slot >= 0 && slot < num_slots) {
        std::memcpy(to + n * row_bytes, from + slot / slots_per_token * row_bytes, row_bytes);
      } else {
        std::memset(to + n * row_bytes, 0, row_bytes);
        if (slot != -1) is_bad = true;
      }
    }
  });
  check_index("permute", "slot_of_row", is_bad);
  return rows;
}

// x[t] = sum_k weights[t, k] * rows[row_of_slot[t, k]]; weights of 1 where `weights` is null.
template <typename T>
void combine(const char* op, const Tensor& rows, const accumulator_t<T>* weights,
             const Tensor& row_of_slot, Tensor& x) {
  using A = accumulator_t<T>;
  const int64_t K = row_of_slot.size(1), N = rows.size(0), D = rows.size(1);
  const T* from = rows.const_data_ptr<T>();
  T* to = x.mutable_data_ptr<T>();
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();
  std::atomic<bool> is_bad{false};
  torch::stable::parallel_for(0, x.size(0), grain(K * D * sizeof(T)),
                              [&](int64_t begin, int64_t end) {
                                std::vector<const T*> row_K(K);
                                std::vector<A> weight_K(K);
                                for (int64_t t = begin; t < end; ++t) {
                                  int64_t num_rows = 0;
                                  for (int64_t s = t * K; s < (t + 1) * K; ++s) {
                                    const int64_t n = row_of[s];
                                    if (n >= 0 && n < N) {
                                      row_K[num_rows] = from + n * D;
                                      weight_K[num_rows++] = weights ? weights[s] : A(1);
                                    } else if (n != -1) {
                                      is_bad = true;
                                    }
                                  }
                                  sum_rows(to + t * D, row_K.data(), weight_K.data(), num_rows, D);
                                }
                              });
  check_index(op, "row_of_slot", is_bad);
}

Tensor permute_backward(const Tensor& grad_rows_any, const Tensor& row_of_slot_any) {
  const auto [T, K] = check_row_of_slot("permute_backward", row_of_slot_any);
  STD_TORCH_CHECK(grad_rows_any.dim() == 2, "permute_backward: grad_rows must be [N, D]");
  const auto [grad_rows, row_of_slot] = contiguous(grad_rows_any, row_of_slot_any);
  Tensor grad_x = torch::stable::new_empty(grad_rows, {T, grad_rows.size(1)});
  for_float_type("permute_backward", grad_rows, [&]<typename Element>() {
    combine<Element>("permute_backward", grad_rows, nullptr, row_of_slot, grad_x);
  });
  return grad_x;
}

Tensor unpermute(const Tensor& rows_any, const Tensor& weights_any, const Tensor& row_of_slot_any) {
  const auto [T, K] = check_unpermute("unpermute", rows_any, weights_any, row_of_slot_any);
  const auto [rows, weights, row_of_slot] = contiguous(rows_any, weights_any, row_of_slot_any);
  Tensor x = torch::stable::new_empty(rows, {T, rows.size(1)});
  for_float_type("unpermute", rows, [&]<typename Element>() {
    combine<Element>("unpermute", rows, weights.const_data_ptr<accumulator_t<Element>>(),
                     row_of_slot, x);
  });
  return x;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_x_any, const Tensor& rows_any,
                                              const Tensor& weights_any,
                                              const Tensor& row_of_slot_any) {
  const char* op = "unpermute_backward";
  const auto [T, K] = check_unpermute(op, rows_any, weights_any, row_of_slot_any);
  const int64_t N = rows_any.size(0), D = rows_any.size(1), slots_per_token = K;
  check_like(op, grad_x_any, T, D, rows_any);
  const auto [grad_x, rows, weights, row_of_slot] =
      contiguous(grad_x_any, rows_any, weights_any, row_of_slot_any);
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();

  // Rows that serve no slot get no gradient below: they must start from zero.
  const int64_t num_used = T * K - std::count(row_of, row_of + T * K, int64_t{-1});
  Tensor grad_rows = num_used == N ? torch::stable::new_empty(rows, {N, D})
                                   : torch::stable::new_zeros(rows, {N, D});
  Tensor grad_weights = torch::stable::new_empty(weights, {T, K});
  for_float_type(op, rows, [&]<typename Element>() {
    using A = accumulator_t<Element>;
    const Element* dx = grad_x.const_data_ptr<Element>();
    const Element* from = rows.const_data_ptr<Element>();
    const A* weight = weights.const_data_ptr<A>();
    Element* drows = grad_rows.mutable_data_ptr<Element>();
    A* dweights = grad_weights.mutable_data_ptr<A>();
    std::atomic<bool> is_bad{false};
    torch::stable::parallel_for(
        0, T * K, grain(D * sizeof(Element)), [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            const int64_t n = row_of[s];
            const bool has_row = n >= 0 && n < N;
            if (!has_row && n != -1) is_bad = true;
            dweights[s] = has_row ? gradient_row(drows + n * D, dx + s / slots_per_token * D,
                                                 from + n * D, weight[s], D)
                                  : A(0);
          }
        });
    check_index(op, "row_of_slot", is_bad);
  });
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
  m.impl("unpermute", TORCH_BOX(&unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward));
}

}  // namespace moesys
