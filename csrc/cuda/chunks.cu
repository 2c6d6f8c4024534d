// moesys::pack_chunks and moesys::add_chunks, one launch for up to MAX_CHUNKS chunks: where they
// are travels in the kernel's arguments. One block works on up to NUMBERS_PER_BLOCK of one chunk.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../chunks.h"
#include "launch.cuh"

namespace moesys {
namespace {

constexpr int MAX_CHUNKS = 128;
constexpr int64_t NUMBERS_PER_BLOCK = 4096;
constexpr int THREADS = WARPS_PER_BLOCK * WARP;
constexpr size_t MAX_ARGUMENT_BYTES = 4096;  // of any launch before CUDA 12.1

// The items of a launch, and which blocks work on them.
struct Layout {
  int64_t length[MAX_CHUNKS];
  uint32_t first_block[MAX_CHUNKS + 1] = {0};
  int num_items = 0;

  void add(int64_t item_length) {
    const int64_t blocks = (item_length + NUMBERS_PER_BLOCK - 1) / NUMBERS_PER_BLOCK;
    length[num_items] = item_length;
    first_block[num_items + 1] = first_block[num_items] + static_cast<uint32_t>(blocks);
    ++num_items;
  }
};

struct PackTable {
  Layout layout;
  const void* from[MAX_CHUNKS];
  void* to[MAX_CHUNKS];
  ScalarType type[MAX_CHUNKS];  // of `from`
};

// Parts of item i: those from first_part[i] to first_part[i + 1].
struct AddTable {
  Layout layout;
  void* total[MAX_CHUNKS];
  const void* part[MAX_CHUNKS];
  uint8_t first_part[MAX_CHUNKS + 1];
};

static_assert(sizeof(PackTable) <= MAX_ARGUMENT_BYTES && sizeof(AddTable) <= MAX_ARGUMENT_BYTES);
static_assert(MAX_CHUNKS <= UINT8_MAX);

// What one block does: so many numbers of an item.
struct Piece {
  int item;
  int64_t skip, length;
};

__device__ __forceinline__ Piece piece_of_block(const Layout& layout) {
  int item = 0, end = layout.num_items;  // the last item that begins at this block or before it
  while (end - item > 1) {
    const int middle = (item + end) / 2;
    (layout.first_block[middle] <= blockIdx.x ? item : end) = middle;
  }
  const int64_t skip = (blockIdx.x - layout.first_block[item]) * NUMBERS_PER_BLOCK;
  return {item, skip, min(NUMBERS_PER_BLOCK, layout.length[item] - skip)};
}

template <typename T, int W>
__device__ __forceinline__ bool is_packed(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T, W>) == 0;
}

// Bits that keep their type stay as they are, those of a NaN too.
template <typename From, typename To>
__device__ __forceinline__ To converted(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return static_cast<To>(static_cast<accumulator_t<To>>(static_cast<accumulator_t<From>>(value)));
  }
}

template <int W, typename From, typename To>
__device__ __forceinline__ void convert_packs(const From* __restrict__ from, To* __restrict__ to,
                                              int64_t begin, int64_t end) {
#pragma unroll 4
  for (int64_t i = begin / W + threadIdx.x; i < end / W; i += THREADS) {
    const auto values = reinterpret_cast<const Pack<From, W>*>(from)[i];
    Pack<To, W> out;
#pragma unroll
    for (int j = 0; j < W; ++j) out.value[j] = converted<From, To>(values.value[j]);
    reinterpret_cast<Pack<To, W>*>(to)[i] = out;
  }
}

template <typename From, typename To>
__device__ __forceinline__ void convert(const void* chunk, To* out, int64_t skip, int64_t length) {
  const From* from = static_cast<const From*>(chunk) + skip;
  To* to = out + skip;
  constexpr int W = 16 / std::max(sizeof(From), sizeof(To));
  const bool is_wide = is_packed<From, W>(from) && is_packed<To, W>(to);
  const int64_t packed = is_wide ? length / W * W : 0;
  if (is_wide) convert_packs<W>(from, to, 0, packed);
  convert_packs<1>(from, to, packed, length);
}

template <typename To>
__global__ void __launch_bounds__(THREADS) pack_pieces(const __grid_constant__ PackTable table) {
  const auto [item, skip, length] = piece_of_block(table.layout);
  const void* from = table.from[item];
  To* to = static_cast<To*>(table.to[item]);
  switch (table.type[item]) {
    case ScalarType::Float:
      return convert<float>(from, to, skip, length);
    case ScalarType::Double:
      return convert<double>(from, to, skip, length);
    case ScalarType::BFloat16:
      return convert<c10::BFloat16>(from, to, skip, length);
    default:
      return convert<c10::Half>(from, to, skip, length);
  }
}

// total += each part, one after the other, rounded in between: as if added one by one.
template <int W, typename Part, typename Total>
__device__ __forceinline__ void add_packs(const void* const* parts, int num_parts, int64_t skip,
                                          Total* __restrict__ total, int64_t begin, int64_t end) {
  using A = sum_t<Part, Total>;
#pragma unroll 2
  for (int64_t i = begin / W + threadIdx.x; i < end / W; i += THREADS) {
    auto sum = reinterpret_cast<Pack<Total, W>*>(total)[i];
    for (int p = 0; p < num_parts; ++p) {
      const Part* part = static_cast<const Part*>(parts[p]) + skip;
      const auto values = reinterpret_cast<const Pack<Part, W>*>(part)[i];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const A one = static_cast<A>(static_cast<accumulator_t<Total>>(sum.value[j])) +
                      static_cast<A>(static_cast<accumulator_t<Part>>(values.value[j]));
        sum.value[j] = static_cast<Total>(static_cast<accumulator_t<Total>>(one));
      }
    }
    reinterpret_cast<Pack<Total, W>*>(total)[i] = sum;
  }
}

template <typename Part, typename Total>
__global__ void __launch_bounds__(THREADS) add_pieces(const __grid_constant__ AddTable table) {
  const auto [item, skip, length] = piece_of_block(table.layout);
  const int num_parts = table.first_part[item + 1] - table.first_part[item];
  const void* const* parts = table.part + table.first_part[item];
  Total* total = static_cast<Total*>(table.total[item]) + skip;
  constexpr int W = 16 / std::max(sizeof(Part), sizeof(Total));
  bool is_wide = is_packed<Total, W>(total);
  for (int p = 0; p < num_parts; ++p)
    is_wide = is_wide && is_packed<Part, W>(static_cast<const Part*>(parts[p]) + skip);
  const int64_t packed = is_wide ? length / W * W : 0;
  if (is_wide) add_packs<W, Part>(parts, num_parts, skip, total, 0, packed);
  add_packs<1, Part>(parts, num_parts, skip, total, packed, length);
}

template <typename Table>
void launch_pieces(const Launch& launch, void (*kernel)(Table), const Table& table) {
  if (table.layout.num_items == 0) return;
  const uint32_t blocks = table.layout.first_block[table.layout.num_items];
  kernel<<<blocks, THREADS, 0, launch.stream()>>>(table);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor pack_chunks(const std::vector<Tensor>& tensors, const Tensor& like) {
  const char* op = "pack_chunks";
  const Launch launch(like);
  const Chunks chunks = chunks_of(op, tensors, like);
  Tensor out = torch::stable::new_empty(like, {chunks.length()});
  for_float_type(op, like, [&]<typename To>() {
    To* to = out.mutable_data_ptr<To>();
    PackTable table;
    for (size_t i = 0; i < chunks.list.size(); ++i) {
      const int64_t start = i == 0 ? 0 : chunks.ends[i - 1];
      const int item = table.layout.num_items;
      table.from[item] = chunks.list[i].from;
      table.to[item] = to + start;
      table.type[item] = chunks.list[i].type;
      table.layout.add(chunks.ends[i] - start);
      if (table.layout.num_items == MAX_CHUNKS) {
        launch_pieces(launch, &pack_pieces<To>, table);
        table.layout.num_items = 0;
      }
    }
    launch_pieces(launch, &pack_pieces<To>, table);
  });
  return out;
}

// A total with more parts than fit goes on in the next launch.
template <typename Part, typename Total>
void add_all(const Launch& launch, const Sums& sums) {
  AddTable table;
  int num_parts = 0;
  const auto launch_items = [&] {
    launch_pieces(launch, &add_pieces<Part, Total>, table);
    table.layout.num_items = num_parts = 0;
  };
  for (size_t i = 0; i < sums.list.size(); ++i) {
    const Sum& sum = sums.list[i];
    const int64_t length = sums.ends[i] - (i == 0 ? 0 : sums.ends[i - 1]);
    for (size_t part = 0; part < sum.parts.size();) {
      if (num_parts == MAX_CHUNKS) launch_items();
      const int item = table.layout.num_items;
      table.total[item] = sum.total;
      table.first_part[item] = static_cast<uint8_t>(num_parts);
      while (part < sum.parts.size() && num_parts < MAX_CHUNKS)
        table.part[num_parts++] = sum.parts[part++];
      table.first_part[item + 1] = static_cast<uint8_t>(num_parts);
      table.layout.add(length);
    }
  }
  launch_items();
}

void add_chunks(const std::vector<Tensor>& parts, const std::vector<Tensor>& totals) {
  const char* op = "add_chunks";
  const Sums sums = sums_of(op, parts, totals);
  if (sums.list.empty()) return;
  const Launch launch(totals[0]);
  for_float_type(op, parts[0], [&]<typename Part>() {
    for_float_type(op, totals[0], [&]<typename Total>() { add_all<Part, Total>(launch, sums); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("pack_chunks", TORCH_BOX(&pack_chunks));
  m.impl("add_chunks", TORCH_BOX(&add_chunks));
}

}  // namespace moesys
