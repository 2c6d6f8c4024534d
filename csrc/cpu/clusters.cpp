// moesys::cross_polytope, member_means, restore and restore's backward. T tokens, K slots each
// (slot t*K+k), C rows (clusters), M members (slots that have a row, in order of row), D model, H
// hashes of V dimensions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "../checks.h"
#include "../restored.h"
#include "simd.h"
#include "tasks.h"

namespace moesys {
namespace {

template <typename T>
inline __attribute__((always_inline)) void add_scaled(accumulator_t<T>* __restrict sum,
                                                      const T* __restrict row,
                                                      accumulator_t<T> weight, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) sum[d] += weight * widen(row[d]);
}

// sum[d] += weight * (row[d] + slope * (x[d] - mean[d])).
template <typename T>
inline __attribute__((always_inline)) void add_restored(
    accumulator_t<T>* __restrict sum, const T* __restrict row, const T* __restrict x,
    const T* __restrict mean, accumulator_t<T> weight, accumulator_t<T> slope, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d)
    sum[d] += weight * restored(widen(row[d]), slope, widen(x[d]), widen(mean[d]));
}

// <grad, row + slope * (x - mean)>.
template <typename T>
inline __attribute__((always_inline)) accumulator_t<T> dot_restored(
    const T* __restrict grad, const T* __restrict row, const T* __restrict x,
    const T* __restrict mean, accumulator_t<T> slope, int64_t D) {
  accumulator_t<T> dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d)
    dot += widen(grad[d]) * restored(widen(row[d]), slope, widen(x[d]), widen(mean[d]));
  return dot;
}

template <typename T>
inline __attribute__((always_inline)) void put_scaled(T* __restrict out,
                                                      const accumulator_t<T>* __restrict sum,
                                                      accumulator_t<T> factor, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] = narrow<T>(factor * sum[d]);
}

template <typename T>
inline __attribute__((always_inline)) void put_quotient(T* __restrict out,
                                                        const accumulator_t<T>* __restrict sum,
                                                        accumulator_t<T> count, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] = narrow<T>(sum[d] / count);
}

// One row from its members: the sum of x[slot / K] times the slot's weight (1 where `weights` is
// null), divided by their number where it is to be a mean.
template <typename T>
inline __attribute__((always_inline)) void gather_row(T* __restrict out, const T* x,
                                                      const int64_t* members, int64_t num_members,
                                                      const accumulator_t<T>* weights, int64_t K,
                                                      int64_t D, bool is_mean) {
  using A = accumulator_t<T>;
  alignas(64) A sum[TILE];
  for (int64_t start = 0; start < D; start += TILE) {
    const int64_t width = std::min(TILE, D - start);
    std::fill(sum, sum + width, A(0));
    for (int64_t m = 0; m < num_members; ++m) {
      const int64_t slot = members[m];
      add_scaled<T>(sum, x + slot / K * D + start, weights ? weights[slot] : A(1), width);
    }
    if (is_mean)
      put_quotient<T>(out + start, sum, A(num_members ? num_members : 1), width);
    else
      put_scaled<T>(out + start, sum, A(1), width);
  }
}

// One token from the rows of its slots, as `restore` of moesys/ops/clusters.py.
template <typename T>
inline __attribute__((always_inline)) void restore_token(
    T* __restrict out, const T* rows, const T* means, const T* x, const accumulator_t<T>* weights,
    const accumulator_t<T>* slopes, const int64_t* row_of_slot, int64_t K, int64_t D) {
  using A = accumulator_t<T>;
  alignas(64) A sum[TILE];
  for (int64_t start = 0; start < D; start += TILE) {
    const int64_t width = std::min(TILE, D - start);
    std::fill(sum, sum + width, A(0));
    for (int64_t k = 0; k < K; ++k) {
      const int64_t c = row_of_slot[k];
      if (c >= 0)
        add_restored<T>(sum, rows + c * D + start, x + start, means + c * D + start, weights[k],
                        slopes[c], width);
    }
    put_scaled<T>(out + start, sum, A(1), width);
  }
}

// The gradients of one token's x and weights.
template <typename T>
inline __attribute__((always_inline)) void restore_token_gradient(
    const T* grad, const T* rows, const T* means, const T* x, const accumulator_t<T>* weights,
    const accumulator_t<T>* slopes, const int64_t* row_of_slot, T* grad_x,
    accumulator_t<T>* grad_weights, int64_t K, int64_t D) {
  using A = accumulator_t<T>;
  A slope = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t c = row_of_slot[k];
    if (c >= 0) slope += weights[k] * slopes[c];
    grad_weights[k] =
        c < 0 ? A(0) : dot_restored<T>(grad, rows + c * D, x, means + c * D, slopes[c], D);
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) grad_x[d] = narrow<T>(slope * widen(grad[d]));
}

// The largest entry's place and sign, as 2 * place + (1 if it is negative); the first of equals.
// -1: not finite.
template <typename T>
inline __attribute__((always_inline)) int64_t vertex(const T* turned, int64_t V) {
  accumulator_t<T> largest = -1;
  int64_t place = 0;
  bool is_finite = true;
  for (int64_t v = 0; v < V; ++v) {
    const accumulator_t<T> size = std::abs(widen(turned[v]));
    is_finite &= size <= std::numeric_limits<accumulator_t<T>>::max();
    if (size > largest) {
      largest = size;
      place = v;
    }
  }
  return is_finite ? vertex_code(place, widen(turned[place])) : -1;
}

#define MOESYS_CLUSTERS(T)                                                                       \
  MOESYS_SIMD void gather(T* out, const T* x, const int64_t* members, int64_t num_members,       \
                          const accumulator_t<T>* weights, int64_t K, int64_t D, bool is_mean) { \
    gather_row<T>(out, x, members, num_members, weights, K, D, is_mean);                         \
  }                                                                                              \
  MOESYS_SIMD void restore_one(T* out, const T* rows, const T* means, const T* x,                \
                               const accumulator_t<T>* weights, const accumulator_t<T>* slopes,  \
                               const int64_t* row_of_slot, int64_t K, int64_t D) {               \
    restore_token<T>(out, rows, means, x, weights, slopes, row_of_slot, K, D);                   \
  }                                                                                              \
  MOESYS_SIMD void restore_one_gradient(                                                         \
      const T* grad, const T* rows, const T* means, const T* x, const accumulator_t<T>* weights, \
      const accumulator_t<T>* slopes, const int64_t* row_of_slot, T* grad_x,                     \
      accumulator_t<T>* grad_weights, int64_t K, int64_t D) {                                    \
    restore_token_gradient<T>(grad, rows, means, x, weights, slopes, row_of_slot, grad_x,        \
                              grad_weights, K, D);                                               \
  }
MOESYS_CLUSTERS(float)
MOESYS_CLUSTERS(double)
MOESYS_CLUSTERS(c10::BFloat16)
MOESYS_CLUSTERS(c10::Half)
#undef MOESYS_CLUSTERS

// first[0] = 0 <= ... <= first[C] <= M, and members are slots: else what follows would read
// elsewhere.
void check_members(const char* op, const int64_t* members, int64_t M, const int64_t* first,
                   int64_t C, int64_t num_slots) {
  bool is_good = first[0] == 0 && first[C] <= M;
  for (int64_t c = 0; c < C; ++c) is_good &= first[c] <= first[c + 1];
  STD_TORCH_CHECK(is_good, op, ": first_member must rise from 0 to at most the number of members");
  for (int64_t m = 0; m < M; ++m) is_good &= members[m] >= 0 && members[m] < num_slots;
  STD_TORCH_CHECK(is_good, op, ": member_slots has an entry that is no slot");
}

void check_rows(const char* op, const int64_t* row_of_slot, int64_t num_slots, int64_t C) {
  bool is_good = true;
  for (int64_t s = 0; s < num_slots; ++s) is_good &= row_of_slot[s] >= -1 && row_of_slot[s] < C;
  STD_TORCH_CHECK(is_good, op, ": row_of_slot has an entry that is neither -1 nor a valid index");
}

Tensor cross_polytope(const Tensor& turned_any) {
  check_turned(turned_any);
  const Tensor turned = torch::stable::contiguous(turned_any);
  const int64_t T = turned.size(0), H = turned.size(1), V = turned.size(2);
  Tensor codes = torch::stable::new_empty(turned, {T, H}, ScalarType::Long);
  int64_t* code = codes.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> first_bad{T};
  for_float_type("cross_polytope", turned, [&]<typename Element>() {
    const Element* from = turned.const_data_ptr<Element>();
    torch::stable::parallel_for(0, T * H, grain(V * sizeof(Element)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    code[i] = vertex<Element>(from + i * V, V);
                                    if (code[i] < 0) keep_least(first_bad, i / H);
                                  }
                                });
  });
  STD_TORCH_CHECK(first_bad.load() == T, "cross_polytope: row ", first_bad.load(),
                  " is not finite");
  return codes;
}

Tensor member_means(const Tensor& x_any, const Tensor& row_of_slot_any, const Tensor& members_any,
                    const Tensor& first_any) {
  const Clusters sizes =
      check_clusters("member_means", x_any, row_of_slot_any, members_any, first_any);
  const auto [x, members, first] = contiguous(x_any, members_any, first_any);
  const int64_t C = sizes.C, K = sizes.K, D = x.size(1);
  const int64_t* member = members.const_data_ptr<int64_t>();
  const int64_t* first_member = first.const_data_ptr<int64_t>();
  check_members("member_means", member, sizes.M, first_member, C, sizes.T * K);
  Tensor means = torch::stable::new_empty(x, {C, D});
  for_float_type("member_means", x, [&]<typename Element>() {
    const Element* from = x.const_data_ptr<Element>();
    Element* to = means.mutable_data_ptr<Element>();
    torch::stable::parallel_for(
        0, C, grain(4 * D * sizeof(Element)), [&](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c)
            gather(to + c * D, from, member + first_member[c],
                   first_member[c + 1] - first_member[c], nullptr, K, D, true);
        });
  });
  return means;
}

// The last two are the backward's.
Tensor restore(const Tensor& rows_any, const Tensor& means_any, const Tensor& x_any,
               const Tensor& weights_any, const Tensor& slopes_any, const Tensor& row_of_slot_any,
               const Tensor&, const Tensor&) {
  const Clusters sizes = check_restore("restore", rows_any, means_any, x_any, weights_any,
                                       slopes_any, row_of_slot_any);
  const auto [rows, means, x, weights, slopes, row_of_slot] =
      contiguous(rows_any, means_any, x_any, weights_any, slopes_any, row_of_slot_any);
  const int64_t T = sizes.T, K = sizes.K, D = x.size(1);
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();
  check_rows("restore", row_of, T * K, sizes.C);
  Tensor y = torch::stable::new_empty(x, {T, D});
  for_float_type("restore", x, [&]<typename Element>() {
    using A = accumulator_t<Element>;
    const Element* row = rows.const_data_ptr<Element>();
    const Element* mean = means.const_data_ptr<Element>();
    const Element* from = x.const_data_ptr<Element>();
    const A* weight = weights.const_data_ptr<A>();
    const A* slope = slopes.const_data_ptr<A>();
    Element* to = y.mutable_data_ptr<Element>();
    torch::stable::parallel_for(0, T, grain(3 * K * D * sizeof(Element)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t t = begin; t < end; ++t)
                                    restore_one(to + t * D, row, mean, from + t * D, weight + t * K,
                                                slope, row_of + t * K, K, D);
                                });
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
  const auto [grad, rows, means, x, weights, slopes, row_of_slot, members, first] =
      contiguous(grad_any, rows_any, means_any, x_any, weights_any, slopes_any, row_of_slot_any,
                 members_any, first_any);
  const int64_t T = sizes.T, K = sizes.K, C = sizes.C, D = x.size(1);
  const int64_t* row_of = row_of_slot.const_data_ptr<int64_t>();
  const int64_t* member = members.const_data_ptr<int64_t>();
  const int64_t* first_member = first.const_data_ptr<int64_t>();
  check_rows(op, row_of, T * K, C);
  check_members(op, member, sizes.M, first_member, C, T * K);
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
    Element* drows = grad_rows.mutable_data_ptr<Element>();
    Element* dx = grad_x.mutable_data_ptr<Element>();
    A* dweights = grad_weights.mutable_data_ptr<A>();
    torch::stable::parallel_for(
        0, C, grain(4 * D * sizeof(Element)), [&](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c)
            gather(drows + c * D, dy, member + first_member[c],
                   first_member[c + 1] - first_member[c], weight, K, D, false);
        });
    torch::stable::parallel_for(
        0, T, grain(3 * K * D * sizeof(Element)), [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t)
            restore_one_gradient(dy + t * D, row, mean, from + t * D, weight + t * K, slope,
                                 row_of + t * K, dx + t * D, dweights + t * K, K, D);
        });
  });
  return {grad_rows, grad_x, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("cross_polytope", TORCH_BOX(&cross_polytope));
  m.impl("member_means", TORCH_BOX(&member_means));
  m.impl("restore", TORCH_BOX(&restore));
  m.impl("restore_backward", TORCH_BOX(&restore_backward));
}

}  // namespace moesys
