// moesys::tokens_per_expert and moesys::expert_order: a stable counting sort of slots by expert.
// Serial: T*K ids take microseconds beside the rows they place. T tokens, K slots each, E experts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace moesys {
namespace {

template <typename Id>
void count(const char* op, const Id* ids, int64_t num_slots, int64_t E, int64_t* counts) {
  std::fill(counts, counts + E, 0);
  for (int64_t s = 0; s < num_slots; ++s) {
    const int64_t id = ids[s];
    if (id == -1) continue;
    STD_TORCH_CHECK(id >= 0 && id < E, op, ": expert id ", id, " of slot ", s,
                    " is not -1 and not in 0..", E - 1);
    ++counts[id];
  }
}

Tensor tokens_per_expert(const Tensor& topk_ids_any, int64_t E) {
  check_ids("tokens_per_expert", topk_ids_any, E);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_any);
  Tensor counts = torch::stable::new_empty(topk_ids, {E}, ScalarType::Long);
  for_id_type("tokens_per_expert", topk_ids, [&]<typename Id>() {
    count("tokens_per_expert", topk_ids.const_data_ptr<Id>(), topk_ids.numel(), E,
          counts.mutable_data_ptr<int64_t>());
  });
  return counts;
}

std::tuple<Tensor, Tensor, Tensor> expert_order(const Tensor& topk_ids_any, int64_t E) {
  const auto [T, K] = check_ids("expert_order", topk_ids_any, E);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_any);
  const int64_t num_slots = T * K;
  Tensor row_of_slot = torch::stable::new_empty(topk_ids, {T, K}, ScalarType::Long);
  Tensor slot_of_row = torch::stable::new_empty(topk_ids, {num_slots}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(topk_ids, {E}, ScalarType::Long);
  int64_t* row_of = row_of_slot.mutable_data_ptr<int64_t>();
  int64_t* slot_of = slot_of_row.mutable_data_ptr<int64_t>();
  const int64_t* counts_E = counts.const_data_ptr<int64_t>();
  for_id_type("expert_order", topk_ids, [&]<typename Id>() {
    const Id* ids = topk_ids.const_data_ptr<Id>();
    count("expert_order", ids, num_slots, E, counts.mutable_data_ptr<int64_t>());
    std::vector<int64_t> next_row(E);
    int64_t num_rows = 0;
    for (int64_t e = 0; e < E; ++e) {
      next_row[e] = num_rows;
      num_rows += counts_E[e];
    }
    for (int64_t s = 0; s < num_slots; ++s) {
      const int64_t id = ids[s];
      row_of[s] = id < 0 ? -1 : next_row[id]++;
      if (id >= 0) slot_of[row_of[s]] = s;
    }
    std::fill(slot_of + num_rows, slot_of + num_slots, -1);
  });
  return {row_of_slot, slot_of_row, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("tokens_per_expert", TORCH_BOX(&tokens_per_expert));
  m.impl("expert_order", TORCH_BOX(&expert_order));
}

}  // namespace moesys
