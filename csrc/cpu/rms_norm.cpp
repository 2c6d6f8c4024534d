// moesys::rms_norm and its backward, fp32. N rows of D elements.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks.h"
#include "simd.h"

namespace moesys {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 16384;
// The weight's gradient is summed over blocks of rows, then over blocks: the same for any threads.
constexpr int64_t BLOCK_ROWS = 64;

// out = x * scale * weight, scale = 1 / sqrt(mean(x^2) + eps).
MOESYS_SIMD void forward_rows(const float* x, const float* weight, float eps, float* out,
                              float* scales, int64_t N, int64_t D) {
  for (int64_t n = 0; n < N; ++n, x += D, out += D) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += x[d] * x[d];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(D) + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] = x[d] * scale * weight[d];
    scales[n] = scale;
  }
}

// With u = x * scale and v = grad * weight: grad_x = scale (v - u mean(u v)), grad_weight += grad
// u.
MOESYS_SIMD void backward_rows(const float* grad, const float* x, const float* weight,
                               const float* scales, float* grad_x, float* grad_weight, int64_t N,
                               int64_t D) {
  for (int64_t n = 0; n < N; ++n, grad += D, x += D, grad_x += D) {
    const float scale = scales[n];
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) dot += x[d] * grad[d] * weight[d];
    const float along = dot * scale * scale * scale / static_cast<float>(D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      grad_x[d] = scale * grad[d] * weight[d] - along * x[d];
      grad_weight[d] += grad[d] * x[d] * scale;
    }
  }
}

int64_t check_rows(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && weight.dim() == 1 &&
                      weight.size(0) == x.size(1) && weight.scalar_type() == ScalarType::Float,
                  "rms_norm: x must be fp32 [N, D] and weight fp32 [D]");
  return x.size(0);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps) {
  const int64_t N = check_rows(x_any, weight_any), D = x_any.size(1);
  const auto [x, weight] = contiguous(x_any, weight_any);
  Tensor out = torch::stable::new_empty(x, {N, D});
  Tensor scales = torch::stable::new_empty(x, {N});
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  float* scale = scales.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, N, GRAIN_ELEMENTS / (D + 1) + 1, [&](int64_t begin, int64_t end) {
    forward_rows(in + begin * D, w, static_cast<float>(eps), y + begin * D, scale + begin,
                 end - begin, D);
  });
  return {out, scales};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_any, const Tensor& x_any,
                                             const Tensor& weight_any, const Tensor& scales) {
  const int64_t N = check_rows(x_any, weight_any), D = x_any.size(1);
  check_like("rms_norm_backward", grad_any, N, D, x_any);
  STD_TORCH_CHECK(
      scales.dim() == 1 && scales.size(0) == N && scales.scalar_type() == ScalarType::Float,
      "rms_norm_backward: scales must be fp32 [N]");
  const auto [grad, x, weight] = contiguous(grad_any, x_any, weight_any);
  const int64_t num_blocks = (N + BLOCK_ROWS - 1) / BLOCK_ROWS;
  Tensor grad_x = torch::stable::new_empty(x, {N, D});
  Tensor grad_weight = torch::stable::new_empty(weight, {D});
  Tensor partial = torch::stable::new_zeros(x, {num_blocks, D});
  const float* dy = grad.const_data_ptr<float>();
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  const float* scale = scales.const_data_ptr<float>();
  float* dx = grad_x.mutable_data_ptr<float>();
  float* sums = partial.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, num_blocks, GRAIN_ELEMENTS / (BLOCK_ROWS * D + 1) + 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) {
                                  const int64_t n = b * BLOCK_ROWS;
                                  backward_rows(dy + n * D, in + n * D, w, scale + n, dx + n * D,
                                                sums + b * D, std::min(BLOCK_ROWS, N - n), D);
                                }
                              });
  float* dw = grad_weight.mutable_data_ptr<float>();
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0;
    for (int64_t b = 0; b < num_blocks; ++b) sum += sums[b * D + d];
    dw[d] = static_cast<float>(sum);
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace moesys
