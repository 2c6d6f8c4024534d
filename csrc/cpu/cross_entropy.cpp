// moesys::cross_entropy and its backward, fp32. T tokens, V classes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../exponential.h"
#include "simd.h"

namespace moesys {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 16384;
constexpr int64_t IGNORED = -100;  // torch's ignore_index

int64_t grain_rows(int64_t V) { return GRAIN_ELEMENTS / (V + 1) + 1; }

// log sum exp of each row.
MOESYS_SIMD void log_sum_exp(const float* logits, float* lse, int64_t T, int64_t V) {
  for (int64_t t = 0; t < T; ++t, logits += V) {
    float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < V; ++v) top = logits[v] > top ? logits[v] : top;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += exp_polynomial(logits[v] - top);
    lse[t] = top + std::log(sum);
  }
}

// out = factor * softmax(logits) of one row.
MOESYS_SIMD void scaled_softmax(const float* __restrict logits, float lse, float factor,
                                float* __restrict out, int64_t V) {
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) out[v] = factor * exp_polynomial(logits[v] - lse);
}

void check(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float &&
                      targets.dim() == 1 && targets.size(0) == logits.size(0) &&
                      targets.scalar_type() == ScalarType::Long,
                  "cross_entropy: logits must be fp32 [T, V] and targets int64 [T]");
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_any, const Tensor& targets_any) {
  check(logits_any, targets_any);
  const auto [logits, targets] = contiguous(logits_any, targets_any);
  const int64_t T = logits.size(0), V = logits.size(1);
  const float* x = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t)
    STD_TORCH_CHECK(target[t] == IGNORED || (target[t] >= 0 && target[t] < V),
                    "cross_entropy: target ", target[t], " of token ", t, " is not ", IGNORED,
                    " and not in 0..", V - 1);
  Tensor lse = torch::stable::new_empty(logits, {T});
  Tensor loss = torch::stable::new_empty(logits, {});
  float* lse_T = lse.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, T, grain_rows(V), [&](int64_t begin, int64_t end) {
    log_sum_exp(x + begin * V, lse_T + begin, end - begin, V);
  });
  double sum = 0;
  for (int64_t t = 0; t < T; ++t)
    if (target[t] != IGNORED) sum += lse_T[t] - x[t * V + target[t]];
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum);
  return {loss, lse};
}

Tensor cross_entropy_backward(const Tensor& grad_any, const Tensor& logits_any,
                              const Tensor& targets_any, const Tensor& lse) {
  check(logits_any, targets_any);
  const auto [logits, targets] = contiguous(logits_any, targets_any);
  const int64_t T = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(grad_any.numel() == 1 && grad_any.scalar_type() == ScalarType::Float &&
                      lse.dim() == 1 && lse.size(0) == T && lse.scalar_type() == ScalarType::Float,
                  "cross_entropy_backward: the gradient must be an fp32 scalar, lse fp32 [T]");
  Tensor grad_logits = torch::stable::new_empty(logits, {T, V});
  const float factor = *grad_any.const_data_ptr<float>();
  const float* x = logits.const_data_ptr<float>();
  const float* lse_T = lse.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float* dx = grad_logits.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, T, grain_rows(V), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (target[t] == IGNORED) {
        std::fill(dx + t * V, dx + (t + 1) * V, 0.0f);
        continue;
      }
      scaled_softmax(x + t * V, lse_T[t], factor, dx + t * V, V);
      dx[t * V + target[t]] -= factor;
    }
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace moesys
