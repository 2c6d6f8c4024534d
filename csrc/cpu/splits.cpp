// moesys::split_rows: slots in order of expert, then code, cut into rows. N slots of K per token, E
// experts, X numbers of a token's sketch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../checks.h"
#include "simd.h"
#include "tasks.h"

namespace moesys {
namespace {

MOESYS_SIMD void add(float* __restrict sum, const float* __restrict sketch, int64_t X) {
#pragma omp simd
  for (int64_t x = 0; x < X; ++x) sum[x] += sketch[x];
}

MOESYS_SIMD float square_distance(const float* __restrict a, const float* __restrict b, int64_t X) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < X; ++x) sum += (a[x] - b[x]) * (a[x] - b[x]);
  return sum;
}

struct Slots {
  const float* sketch;
  const int64_t* slots;
  const int64_t* codes;
  int64_t K, X;
  float most;
  std::vector<int64_t> digit;  // what one is worth: of the first, the second, ... digit
  bool* is_first;

  const float* sketch_of(int64_t n) const { return sketch + slots[n] / K * X; }

  // The end of the slots from `begin` on that have its first `depth` digits.
  int64_t end_of(int64_t begin, int64_t end, size_t depth) const {
    const int64_t prefix = codes[begin] / digit[depth - 1];
    int64_t n = begin + 1;
    while (n < end && codes[n] / digit[depth - 1] == prefix) ++n;
    return n;
  }

  // Of slots that have `depth` digits in common.
  void cut(int64_t begin, int64_t end, size_t depth, float* mean) const {
    if (end - begin == 1 || spread(begin, end, mean) <= most) {
      is_first[begin] = true;
    } else if (depth == digit.size()) {
      std::fill(is_first + begin, is_first + end, true);
    } else {
      for (int64_t n = begin; n < end;) {
        const int64_t next = end_of(n, end, depth + 1);
        cut(n, next, depth + 1, mean);
        n = next;
      }
    }
  }

  float spread(int64_t begin, int64_t end, float* mean) const {
    std::fill(mean, mean + X, 0.0f);
    for (int64_t n = begin; n < end; ++n) add(mean, sketch_of(n), X);
    for (int64_t x = 0; x < X; ++x) mean[x] /= static_cast<float>(end - begin);
    float sum = 0;
    for (int64_t n = begin; n < end; ++n) sum += square_distance(sketch_of(n), mean, X);
    return sum / static_cast<float>(end - begin);
  }
};

Tensor split_rows(const Tensor& sketch_any, const Tensor& slots_any, const Tensor& ids_any,
                  const Tensor& codes_any, int64_t K, int64_t num_experts, int64_t base,
                  int64_t digits, double most) {
  const char* op = "split_rows";
  const auto [sketch, slots, ids, codes] = contiguous(sketch_any, slots_any, ids_any, codes_any);
  const int64_t N = slots.numel();
  STD_TORCH_CHECK(sketch.dim() == 2 && sketch.scalar_type() == ScalarType::Float && K > 0, op,
                  ": sketches must be fp32 [T, X] and K positive");
  for (const Tensor* one : {&slots, &ids, &codes})
    STD_TORCH_CHECK(one->dim() == 1 && one->numel() == N && one->scalar_type() == ScalarType::Long,
                    op, ": slots, ids and codes must be int64 [N]");
  STD_TORCH_CHECK(digits > 0 && base > 1, op, ": codes must have digits");
  Slots all{.sketch = sketch.const_data_ptr<float>(),
            .slots = slots.const_data_ptr<int64_t>(),
            .codes = codes.const_data_ptr<int64_t>(),
            .K = K,
            .X = sketch.size(1),
            .most = static_cast<float>(most),
            .digit = std::vector<int64_t>(digits, 1),
            .is_first = nullptr};
  for (int64_t d = digits - 1; d > 0; --d) all.digit[d - 1] = all.digit[d] * base;
  bool is_good = true;
  for (int64_t n = 0; n < N; ++n)
    is_good &= all.slots[n] >= 0 && all.slots[n] / K < sketch.size(0) && all.codes[n] >= 0;
  STD_TORCH_CHECK(is_good, op, ": slots must be those of the sketches, codes at least 0");
  Tensor is_first = torch::stable::new_zeros(slots, {N}, ScalarType::Bool);
  all.is_first = is_first.mutable_data_ptr<bool>();
  // Slots of an expert that have the first digit in common are a task.
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> tasks;
  for (int64_t begin = 0; begin < N && id[begin] < num_experts;) {
    int64_t end = begin + 1;
    while (end < N && id[end] == id[begin]) ++end;
    for (int64_t n = begin; n < end;) {
      const int64_t next = all.end_of(n, end, 1);
      tasks.emplace_back(n, next);
      n = next;
    }
    begin = end;
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t slots_per_task = N / std::max<int64_t>(num_tasks, 1) + 1;
  torch::stable::parallel_for(0, num_tasks, grain(slots_per_task * all.X * 4),
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> mean(all.X);
                                for (int64_t t = begin; t < end; ++t)
                                  all.cut(tasks[t].first, tasks[t].second, 1, mean.data());
                              });
  return is_first;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) { m.impl("split_rows", TORCH_BOX(&split_rows)); }

}  // namespace moesys
