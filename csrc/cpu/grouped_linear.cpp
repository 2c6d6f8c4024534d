// moesys::grouped_linear and its two gradients, fp32. R rows in order of expert, L experts, I
// inputs, O outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "../checks.h"
#include "panel.h"

namespace moesys {
namespace {

using panel::Strided;

// Of C in one task: threads share even a single expert.
constexpr int64_t BLOCK_ROWS = 512;
constexpr int64_t COLUMNS = panel::PANELS * panel::WIDTH;

// C = A B for one expert.
struct Product {
  Strided a, b;
  float* c;
  int64_t rows, columns, depth;
};

struct Task {
  int64_t product, row, column;
};

// Threads take blocks as they get free, so uneven experts keep all of them busy; each
// element is summed by one thread in one order, so the result does not depend on timing.
void run(const std::vector<Product>& products) {
  std::vector<Task> tasks;
  for (size_t p = 0; p < products.size(); ++p)
    for (int64_t column = 0; column < products[p].columns; column += COLUMNS)
      for (int64_t row = 0; row < products[p].rows; row += BLOCK_ROWS)
        tasks.push_back({static_cast<int64_t>(p), row, column});
  std::atomic<size_t> next{0};
  const int64_t num_threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    constexpr size_t PACKED_BYTES = panel::PACKED * sizeof(float);
    const auto release = [](void* memory) { ::operator delete(memory, std::align_val_t{64}); };
    const std::unique_ptr<void, decltype(release)> memory(
        ::operator new(PACKED_BYTES, std::align_val_t{64}), release);
    for (size_t t = next++; t < tasks.size(); t = next++) {
      const auto [p, row, column] = tasks[t];
      const Product& x = products[p];
      panel::product(x.a.at(row, 0), std::min(BLOCK_ROWS, x.rows - row), x.b.at(0, column), x.depth,
                     x.c + row * x.columns + column, x.columns,
                     std::min(COLUMNS, x.columns - column), static_cast<float*>(memory.get()));
    }
  });
}

struct Sizes {
  int64_t L, O, I;
};

void check_matrix(const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == columns && x.scalar_type() == ScalarType::Float,
                  "grouped_linear: rows and their gradients must be fp32 [R, I] and [R, O]");
}

Sizes check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == ScalarType::Float,
                  "grouped_linear: weight must be fp32 [L, O, I]");
  return {weight.size(0), weight.size(1), weight.size(2)};
}

// Exclusive prefix sums of the counts, L + 1 of them.
std::vector<int64_t> row_offsets(const Tensor& counts_any, int64_t L, int64_t R) {
  STD_TORCH_CHECK(counts_any.dim() == 1 && counts_any.size(0) == L &&
                      counts_any.scalar_type() == ScalarType::Long,
                  "grouped_linear: tokens_per_expert must be int64 [L]");
  const Tensor counts = torch::stable::contiguous(counts_any);
  const int64_t* count = counts.const_data_ptr<int64_t>();
  std::vector<int64_t> offsets(L + 1, 0);
  for (int64_t e = 0; e < L; ++e) {
    STD_TORCH_CHECK(count[e] >= 0 && count[e] <= R - offsets[e],
                    "grouped_linear: tokens_per_expert must be positive and sum to at most ", R);
    offsets[e + 1] = offsets[e] + count[e];
  }
  return offsets;
}

Tensor grouped_linear(const Tensor& rows_any, const Tensor& weight_any, const Tensor& counts) {
  const auto [L, O, I] = check_weight(weight_any);
  check_matrix(rows_any, I);
  const auto [rows, weight] = contiguous(rows_any, weight_any);
  const int64_t R = rows.size(0);
  const auto offsets = row_offsets(counts, L, R);
  Tensor out = torch::stable::new_empty(rows, {R, O});
  const float* x = rows.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  std::vector<Product> products;
  for (int64_t e = 0; e < L; ++e)
    products.push_back({.a = {x + offsets[e] * I, I, 1},
                        .b = {w + e * O * I, 1, I},
                        .c = y + offsets[e] * O,
                        .rows = offsets[e + 1] - offsets[e],
                        .columns = O,
                        .depth = I});
  run(products);
  return out;
}

Tensor grouped_linear_grad_rows(const Tensor& grad_any, const Tensor& weight_any,
                                const Tensor& counts) {
  const auto [L, O, I] = check_weight(weight_any);
  check_matrix(grad_any, O);
  const auto [grad, weight] = contiguous(grad_any, weight_any);
  const int64_t R = grad.size(0);
  const auto offsets = row_offsets(counts, L, R);
  Tensor grad_rows = torch::stable::new_empty(grad, {R, I});
  const float* dy = grad.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* dx = grad_rows.mutable_data_ptr<float>();
  std::vector<Product> products;
  for (int64_t e = 0; e < L; ++e)
    products.push_back({.a = {dy + offsets[e] * O, O, 1},
                        .b = {w + e * O * I, I, 1},
                        .c = dx + offsets[e] * I,
                        .rows = offsets[e + 1] - offsets[e],
                        .columns = I,
                        .depth = O});
  run(products);
  return grad_rows;
}

Tensor grouped_linear_grad_weight(const Tensor& grad_any, const Tensor& rows_any,
                                  const Tensor& counts) {
  STD_TORCH_CHECK(grad_any.dim() == 2 && rows_any.dim() == 2 && counts.dim() == 1 &&
                      grad_any.size(0) == rows_any.size(0),
                  "grouped_linear: the gradient and the rows must be [R, O] and [R, I]");
  const int64_t O = grad_any.size(1), I = rows_any.size(1), L = counts.size(0);
  check_matrix(grad_any, O);
  check_matrix(rows_any, I);
  const auto [grad, rows] = contiguous(grad_any, rows_any);
  const auto offsets = row_offsets(counts, L, rows.size(0));
  Tensor grad_weight = torch::stable::new_empty(rows, {L, O, I});
  const float* dy = grad.const_data_ptr<float>();
  const float* x = rows.const_data_ptr<float>();
  float* dw = grad_weight.mutable_data_ptr<float>();
  std::vector<Product> products;
  for (int64_t e = 0; e < L; ++e)
    products.push_back({.a = {dy + offsets[e] * O, 1, O},
                        .b = {x + offsets[e] * I, I, 1},
                        .c = dw + e * O * I,
                        .rows = O,
                        .columns = I,
                        .depth = offsets[e + 1] - offsets[e]});
  run(products);
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_grad_rows", TORCH_BOX(&grouped_linear_grad_rows));
  m.impl("grouped_linear_grad_weight", TORCH_BOX(&grouped_linear_grad_weight));
}

}  // namespace moesys
