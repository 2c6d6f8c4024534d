// What an op needs of its arguments to be memory-safe. The same on both devices; moesys/ops/ says
// it in the user's words before a call gets here.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "element_types.h"

namespace moesys {

template <typename... Tensors>
std::array<Tensor, sizeof...(Tensors)> contiguous(const Tensors&... any) {
  return {torch::stable::contiguous(any)...};
}

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

struct Clusters {
  int64_t T, K, M, C;
};

inline Clusters check_clusters(const char* op, const Tensor& x, const Tensor& row_of_slot,
                               const Tensor& member_slots, const Tensor& first_member) {
  const Slots slots = check_row_of_slot(op, row_of_slot);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == slots.T, op, ": x must be [T, D], T of row_of_slot");
  STD_TORCH_CHECK(member_slots.dim() == 1 && member_slots.scalar_type() == ScalarType::Long &&
                      first_member.dim() == 1 && first_member.size(0) > 0 &&
                      first_member.scalar_type() == ScalarType::Long,
                  op, ": member_slots must be int64 [M] and first_member int64 [C + 1]");
  return {slots.T, slots.K, member_slots.size(0), first_member.size(0) - 1};
}

inline Clusters check_restore(const char* op, const Tensor& rows, const Tensor& means,
                              const Tensor& x, const Tensor& weights, const Tensor& slopes,
                              const Tensor& row_of_slot) {
  const Slots slots = check_unpermute(op, rows, weights, row_of_slot);
  const auto is_like_rows = [&](const Tensor& other, int64_t count) {
    return other.dim() == 2 && other.size(0) == count && other.size(1) == rows.size(1) &&
           other.scalar_type() == rows.scalar_type();
  };
  STD_TORCH_CHECK(is_like_rows(means, rows.size(0)) && is_like_rows(x, slots.T), op,
                  ": means must be [C, D] and x [T, D] of rows' type");
  STD_TORCH_CHECK(slopes.dim() == 1 && slopes.size(0) == rows.size(0) &&
                      slopes.scalar_type() == weights.scalar_type(),
                  op, ": slopes must be [C] of the weights' type");
  return {slots.T, slots.K, 0, rows.size(0)};
}

inline Clusters check_restore_backward(const char* op, const Tensor& grad, const Tensor& rows,
                                       const Tensor& means, const Tensor& x, const Tensor& weights,
                                       const Tensor& slopes, const Tensor& row_of_slot,
                                       const Tensor& member_slots, const Tensor& first_member) {
  check_restore(op, rows, means, x, weights, slopes, row_of_slot);
  const Clusters sizes = check_clusters(op, x, row_of_slot, member_slots, first_member);
  check_like(op, grad, sizes.T, x.size(1), x);
  STD_TORCH_CHECK(sizes.C == rows.size(0), op, ": first_member must be [C + 1], C of rows");
  return sizes;
}

inline void check_turned(const Tensor& turned) {
  STD_TORCH_CHECK(turned.dim() == 3 && turned.size(2) > 0,
                  "cross_polytope: the turned rows must be [T, H, V]");
}

// A row on the wire: D codes, then a scale of 4 bytes for each block of columns.
struct Wire {
  int64_t D, block, num_blocks, codes_per_byte;

  constexpr int64_t code_bytes() const { return (D + codes_per_byte - 1) / codes_per_byte; }
  constexpr int64_t row_bytes() const { return code_bytes() + 4 * num_blocks; }
};

// `block` 0 = the whole row.
inline Wire wire_of(const char* op, int64_t D, int64_t block, int64_t codes_per_byte) {
  STD_TORCH_CHECK(D > 0 && block >= 0, op, ": rows must have columns, blocks at least 0 of them");
  if (block == 0 || block > D) block = D;
  STD_TORCH_CHECK(block == D || block % codes_per_byte == 0, op, ": a block must be whole bytes");
  return {D, block, (D + block - 1) / block, codes_per_byte};
}

inline Wire check_pack(const Tensor& x, const Tensor& slot_of_row, int64_t K, int64_t block,
                       int64_t codes_per_byte) {
  STD_TORCH_CHECK(x.dim() == 2 && K > 0, "pack: x must be [T, D] and K positive");
  STD_TORCH_CHECK(slot_of_row.dim() == 1 && slot_of_row.scalar_type() == ScalarType::Long,
                  "pack: slot_of_row must be int64 [N]");
  return wire_of("pack", x.size(1), block, codes_per_byte);
}

inline Wire check_unpack(const Tensor& bytes, int64_t D, int64_t block, int64_t codes_per_byte) {
  const Wire wire = wire_of("unpack", D, block, codes_per_byte);
  STD_TORCH_CHECK(bytes.dim() == 2 && bytes.scalar_type() == ScalarType::Byte &&
                      bytes.size(1) == wire.row_bytes(),
                  "unpack: rows must be uint8 [N, ", wire.row_bytes(), "]");
  return wire;
}

inline int64_t check_gate_up(const char* op, const Tensor& gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, ": gate_up must be [N, 2F]");
  return gate_up.size(1) / 2;
}

}  // namespace moesys
