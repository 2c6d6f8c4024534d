// What an op needs of its arguments to be memory-safe. The same on both devices; moesys/ops/ says
// it in the user's words before a call gets here.
#pragma once

#include "element_types.h"

namespace moesys {

struct Slots {
  int64_t T, K;
};

inline Slots check_ids(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  STD_TORCH_CHECK(topk_ids.dim() == 2, op, ": topk_ids must be [T, K]");
  STD_TORCH_CHECK(num_experts > 0, op, ": num_experts must be positive, got ", num_experts);
  return {topk_ids.size(0), topk_ids.size(1)};
}

inline Slots check_row_of_slot(const char* op, const Tensor& row_of_slot) {
  STD_TORCH_CHECK(row_of_slot.dim() == 2 && row_of_slot.scalar_type() == ScalarType::Long, op,
                  ": row_of_slot must be int64 [T, K]");
  return {row_of_slot.size(0), row_of_slot.size(1)};
}

inline Slots check_permute(const Tensor& x, const Tensor& slot_of_row, const Tensor& row_of_slot) {
  const Slots slots = check_row_of_slot("permute", row_of_slot);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == slots.T,
                  "permute: x must be [T, D], T of row_of_slot");
  STD_TORCH_CHECK(slot_of_row.dim() == 1 && slot_of_row.scalar_type() == ScalarType::Long,
                  "permute: slot_of_row must be int64 [N]");
  return slots;
}

inline Slots check_unpermute(const char* op, const Tensor& rows, const Tensor& weights,
                             const Tensor& row_of_slot) {
  const Slots slots = check_row_of_slot(op, row_of_slot);
  STD_TORCH_CHECK(rows.dim() == 2, op, ": rows must be [N, D]");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == slots.T && weights.size(1) == slots.K,
                  op, ": weights must be [T, K] as row_of_slot");
  const bool is_double = rows.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weights.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
                  ": weights must be fp32 (fp64 with fp64 rows)");
  return slots;
}

inline void check_like(const char* op, const Tensor& grad, int64_t rows, int64_t columns,
                       const Tensor& value) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == columns &&
                      grad.scalar_type() == value.scalar_type(),
                  op, ": the incoming gradient has the wrong shape or type");
}

inline int64_t check_gate_up(const char* op, const Tensor& gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, ": gate_up must be [N, 2F]");
  return gate_up.size(1) / 2;
}

}  // namespace moesys
