// moesys::halve: slots of each expert cut in two, and again, until those that stay together are
// near each other. N slots of K per token, E experts, X numbers of a token's sketch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "simd.h"
#include "tasks.h"

namespace moesys {
namespace {

MOESYS_SIMD void add(float* __restrict sum, const float* __restrict sketch, float weight,
                     int64_t X) {
#pragma omp simd
  for (int64_t x = 0; x < X; ++x) sum[x] += weight * sketch[x];
}

// apart = sketch - mean; returns the square of its length.
MOESYS_SIMD float subtract(float* __restrict apart, const float* __restrict sketch,
                           const float* __restrict mean, int64_t X) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t x = 0; x < X; ++x) {
    apart[x] = sketch[x] - mean[x];
    square += apart[x] * apart[x];
  }
  return square;
}

MOESYS_SIMD float dot(const float* __restrict a, const float* __restrict b, int64_t X) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < X; ++x) sum += a[x] * b[x];
  return sum;
}

struct Halving {
  const float* sketch;
  int64_t K, X, steps;
  float most;
  int64_t* codes;
  std::vector<float> mean, direction, next, apart;

  // Of n slots in rising order, which it reorders.
  void cut(int64_t* slots, int64_t n, int64_t cuts_left) {
    if (n == 1 || spread(slots, n) <= most) {
      for (int64_t i = 0; i < n; ++i) codes[slots[i]] = slots[0];
    } else if (cuts_left == 0) {
      for (int64_t i = 0; i < n; ++i) codes[slots[i]] = slots[i];
    } else {
      find_direction(n);
      // By place, as `apart` is.
      std::vector<int64_t> right;
      int64_t num_left = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (dot(apart.data() + i * X, direction.data(), X) > 0)
          right.push_back(slots[i]);
        else
          slots[num_left++] = slots[i];
      }
      std::copy(right.begin(), right.end(), slots + num_left);
      if (num_left == 0 || num_left == n) num_left = 1;
      cut(slots, num_left, cuts_left - 1);
      cut(slots + num_left, n - num_left, cuts_left - 1);
    }
  }

  // The mean square of what members are from their mean; leaves that in `apart`, and in `direction`
  // that of the member that is furthest.
  float spread(const int64_t* slots, int64_t n) {
    std::fill(mean.begin(), mean.end(), 0.0f);
    for (int64_t i = 0; i < n; ++i) add(mean.data(), sketch + slots[i] / K * X, 1.0f, X);
    for (float& value : mean) value /= static_cast<float>(n);
    float sum = 0, furthest = -1;
    for (int64_t i = 0; i < n; ++i) {
      float* here = apart.data() + i * X;
      const float square = subtract(here, sketch + slots[i] / K * X, mean.data(), X);
      sum += square;
      if (square > furthest) {
        furthest = square;
        std::copy(here, here + X, direction.begin());
      }
    }
    return sum / static_cast<float>(n);
  }

  void find_direction(int64_t n) {
    for (int64_t step = 0; step < steps; ++step) {
      std::fill(next.begin(), next.end(), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        const float* here = apart.data() + i * X;
        add(next.data(), here, dot(here, direction.data(), X) / static_cast<float>(n), X);
      }
      const float length = std::sqrt(dot(next.data(), next.data(), X));
      for (int64_t x = 0; x < X; ++x) direction[x] = next[x] / length;
    }
  }
};

Tensor halve(const Tensor& sketch_any, const Tensor& ids_any, int64_t num_experts,
             int64_t most_cuts, int64_t steps, double most) {
  const char* op = "halve";
  const auto [sketch, ids] = contiguous(sketch_any, ids_any);
  STD_TORCH_CHECK(sketch.dim() == 2 && sketch.scalar_type() == ScalarType::Float, op,
                  ": sketches must be fp32 [T, X]");
  STD_TORCH_CHECK(
      ids.dim() == 2 && ids.size(0) == sketch.size(0) && ids.scalar_type() == ScalarType::Long, op,
      ": experts must be int64 [T, K]");
  const int64_t T = sketch.size(0), X = sketch.size(1), K = ids.size(1), N = T * K;
  const float* from = sketch.const_data_ptr<float>();
  for (int64_t i = 0; i < T * X; ++i)
    STD_TORCH_CHECK(std::isfinite(from[i]), op, ": row ", i / X, " is not finite");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> ends(num_experts + 1, 0);
  Tensor codes = torch::stable::new_empty(ids, {T, K});
  int64_t* code = codes.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(id[n] >= -1 && id[n] < num_experts, op,
                    ": experts has an entry that is neither -1 nor a valid index");
    code[n] = n;
    if (id[n] >= 0) ++ends[id[n] + 1];
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<int64_t> slots(ends[num_experts]), filled(ends.begin(), ends.end() - 1);
  for (int64_t n = 0; n < N; ++n)
    if (id[n] >= 0) slots[filled[id[n]]++] = n;
  const int64_t slots_per_expert = N / std::max<int64_t>(num_experts, 1) + 1;
  torch::stable::parallel_for(
      0, num_experts, grain(slots_per_expert * X * 64), [&](int64_t begin, int64_t end) {
        int64_t most_slots = 0;
        for (int64_t e = begin; e < end; ++e)
          most_slots = std::max(most_slots, ends[e + 1] - ends[e]);
        const std::vector<float> room(X);
        Halving all{.sketch = from,
                    .K = K,
                    .X = X,
                    .steps = steps,
                    .most = static_cast<float>(most),
                    .codes = code,
                    .mean = room,
                    .direction = room,
                    .next = room,
                    .apart = std::vector<float>(most_slots * X)};
        for (int64_t e = begin; e < end; ++e)
          if (ends[e + 1] > ends[e])
            all.cut(slots.data() + ends[e], ends[e + 1] - ends[e], most_cuts);
      });
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) { m.impl("halve", TORCH_BOX(&halve)); }

}  // namespace moesys
