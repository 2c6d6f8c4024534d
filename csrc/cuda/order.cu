// moesys::tokens_per_expert and moesys::expert_order: a stable counting sort of slots by expert.
// Slots are cut into tiles, one warp each. Three launches: every tile counts its experts; every
// expert scans its counts over the tiles; every tile walks its slots in order and places them.
// No position depends on the timing of an atomic. T tokens, K slots each, E experts, B tiles.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cassert>
#include <tuple>

#include "../checks.h"
#include "launch.cuh"

namespace moesys {
namespace {

constexpr int64_t TILE_SLOTS = 512;
constexpr int64_t MAX_EXPERTS = 6144;  // an int64 for each in 48 KiB of shared memory

// Sum of the lanes up to and including this one.
__device__ __forceinline__ int64_t inclusive_scan(int64_t value) {
  for (int offset = 1; offset < WARP; offset *= 2) {
    const int64_t below = __shfl_up_sync(ALL_LANES, value, offset);
    if (lane_index() >= offset) value += below;
  }
  return value;
}

template <typename Id>
__global__ void count_tiles(const Id* __restrict__ ids, int64_t* __restrict__ counts_EB,
                            int64_t num_slots, int64_t E) {
  extern __shared__ int64_t shared[];
  auto* counts = reinterpret_cast<unsigned long long*>(shared);
  for (int64_t e = lane_index(); e < E; e += WARP) counts[e] = 0;
  __syncwarp();
  const int64_t begin = blockIdx.x * TILE_SLOTS;
  const int64_t end = min(begin + TILE_SLOTS, num_slots);
  for (int64_t s = begin + lane_index(); s < end; s += WARP) {
    const int64_t id = ids[s];
    assert(id >= -1 && id < E);
    if (id >= 0) atomicAdd(&counts[id], 1ull);  // a sum: its order does not show
  }
  __syncwarp();
  for (int64_t e = lane_index(); e < E; e += WARP) {
    counts_EB[e * gridDim.x + blockIdx.x] = static_cast<int64_t>(counts[e]);
  }
}

// In place: counts_EB[e, b] becomes the number of e's slots in tiles before b. One warp per expert.
__global__ void scan_tiles(int64_t* __restrict__ counts_EB, int64_t* __restrict__ counts_E,
                           int64_t B, int64_t E) {
  const int64_t e = warp_index();
  if (e >= E) return;
  int64_t total = 0;
  for (int64_t first = 0; first < B; first += WARP) {
    const int64_t b = first + lane_index();
    const int64_t count = b < B ? counts_EB[e * B + b] : 0;
    const int64_t inclusive = inclusive_scan(count);
    if (b < B) counts_EB[e * B + b] = total + inclusive - count;
    total += __shfl_sync(ALL_LANES, inclusive, WARP - 1);
  }
  if (lane_index() == 0) counts_E[e] = total;
}

template <typename Id>
__global__ void place_slots(const Id* __restrict__ ids, const int64_t* __restrict__ before_EB,
                            const int64_t* __restrict__ counts_E, int64_t* __restrict__ row_of_slot,
                            int64_t* __restrict__ slot_of_row, int64_t num_slots, int64_t E) {
  extern __shared__ int64_t next_row[];
  int64_t total = 0;
  for (int64_t first = 0; first < E; first += WARP) {
    const int64_t e = first + lane_index();
    const int64_t count = e < E ? counts_E[e] : 0;
    const int64_t inclusive = inclusive_scan(count);
    if (e < E) next_row[e] = total + inclusive - count + before_EB[e * gridDim.x + blockIdx.x];
    total += __shfl_sync(ALL_LANES, inclusive, WARP - 1);
  }
  __syncwarp();
  const unsigned lower_lanes = (1u << lane_index()) - 1;
  const int64_t begin = blockIdx.x * TILE_SLOTS;
  const int64_t end = min(begin + TILE_SLOTS, num_slots);
  for (int64_t first = begin; first < end; first += WARP) {
    const int64_t s = first + lane_index();
    const int id = s < end ? static_cast<int>(ids[s]) : -1;
    const unsigned same = __match_any_sync(ALL_LANES, id);
    const int rank = __popc(same & lower_lanes);
    int64_t row = -1;
    if (id >= 0) row = next_row[id] + rank;
    __syncwarp();
    if (id >= 0 && rank == 0) next_row[id] += __popc(same);
    __syncwarp();
    if (s < end) row_of_slot[s] = row;
    if (row >= 0) slot_of_row[row] = s;
  }
}

// Fills counts_E and returns before_EB.
Tensor count(const Launch& launch, const char* op, const Tensor& topk_ids, int64_t E,
             Tensor& counts) {
  STD_TORCH_CHECK(E <= MAX_EXPERTS, op, ": at most ", MAX_EXPERTS, " experts on a GPU, got ", E);
  const int64_t num_slots = topk_ids.numel();
  const int64_t B = std::max<int64_t>(1, (num_slots + TILE_SLOTS - 1) / TILE_SLOTS);
  STD_TORCH_CHECK(B <= INT32_MAX, op, ": too many slots");
  Tensor before = torch::stable::new_empty(topk_ids, {E, B}, ScalarType::Long);
  int64_t* before_EB = before.mutable_data_ptr<int64_t>();
  for_id_type(op, topk_ids, [&]<typename Id>() {
    count_tiles<Id><<<static_cast<unsigned>(B), WARP, E * sizeof(int64_t), launch.stream()>>>(
        topk_ids.const_data_ptr<Id>(), before_EB, num_slots, E);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  launch.warp_per_item(&scan_tiles, E, before_EB, counts.mutable_data_ptr<int64_t>(), B);
  return before;
}

Tensor tokens_per_expert(const Tensor& topk_ids_any, int64_t E) {
  check_ids("tokens_per_expert", topk_ids_any, E);
  const Launch launch(topk_ids_any);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_any);
  Tensor counts = torch::stable::new_empty(topk_ids, {E}, ScalarType::Long);
  count(launch, "tokens_per_expert", topk_ids, E, counts);
  return counts;
}

std::tuple<Tensor, Tensor, Tensor> expert_order(const Tensor& topk_ids_any, int64_t E) {
  const Slots slots = check_ids("expert_order", topk_ids_any, E);
  const int64_t num_slots = slots.T * slots.K;
  const Launch launch(topk_ids_any);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_any);
  Tensor row_of_slot = torch::stable::new_empty(topk_ids, {slots.T, slots.K}, ScalarType::Long);
  Tensor slot_of_row = torch::stable::new_empty(topk_ids, {num_slots}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(topk_ids, {E}, ScalarType::Long);
  const Tensor before = count(launch, "expert_order", topk_ids, E, counts);
  int64_t* slot_of = slot_of_row.mutable_data_ptr<int64_t>();
  // All bits set is -1: what stays of it is the tail without rows.
  if (num_slots > 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(slot_of, 0xff, num_slots * sizeof(int64_t), launch.stream()));
  }
  for_id_type("expert_order", topk_ids, [&]<typename Id>() {
    place_slots<Id>
        <<<static_cast<unsigned>(before.size(1)), WARP, E * sizeof(int64_t), launch.stream()>>>(
            topk_ids.const_data_ptr<Id>(), before.const_data_ptr<int64_t>(),
            counts.const_data_ptr<int64_t>(), row_of_slot.mutable_data_ptr<int64_t>(), slot_of,
            num_slots, E);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {row_of_slot, slot_of_row, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("tokens_per_expert", TORCH_BOX(&tokens_per_expert));
  m.impl("expert_order", TORCH_BOX(&expert_order));
}

}  // namespace moesys
