// Chunks of numbers, each of its own length, as if they lay end to end: what both devices' kernels
// are given. Empty chunks are left out.
#pragma once

#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"

namespace moesys {

struct Chunk {
  const void* from;
  ScalarType type;
};

struct Chunks {
  std::vector<Chunk> list;
  std::vector<int64_t> ends;      // inclusive prefix sums of their lengths
  std::vector<Tensor> is_copied;  // memory of those that were not contiguous

  int64_t length() const { return ends.empty() ? 0 : ends.back(); }
};

// A total, and what is added to it, in this order.
struct Sum {
  void* total;
  std::vector<const void*> parts;
};

struct Sums {
  std::vector<Sum> list;
  std::vector<int64_t> ends;  // inclusive prefix sums of the totals' lengths

  int64_t length() const { return ends.empty() ? 0 : ends.back(); }
};

inline void check_device(const char* op, const char* name, size_t i, const Tensor& chunk,
                         const Tensor& like) {
  STD_TORCH_CHECK(
      chunk.is_cuda() == like.is_cuda() && chunk.get_device_index() == like.get_device_index(), op,
      ": ", name, " ", i, " is on another device");
}

inline Chunks chunks_of(const char* op, const std::vector<Tensor>& tensors, const Tensor& like) {
  Chunks chunks;
  chunks.list.reserve(tensors.size());
  chunks.ends.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(op, "chunk", i, tensors[i], like);
    for_float_type(op, tensors[i], [&]<typename T>() {});  // an error now, not in a thread
    const int64_t length = tensors[i].numel();
    if (length == 0) continue;
    const bool is_contiguous = tensors[i].is_contiguous();
    if (!is_contiguous) chunks.is_copied.push_back(torch::stable::contiguous(tensors[i]));
    const Tensor& chunk = is_contiguous ? tensors[i] : chunks.is_copied.back();
    chunks.ends.push_back(chunks.length() + length);
    chunks.list.push_back({chunk.const_data_ptr(), chunk.scalar_type()});
  }
  return chunks;
}

// A total that stands several times gets all of its parts at once, in their order.
inline Sums sums_of(const char* op, const std::vector<Tensor>& parts,
                    const std::vector<Tensor>& totals) {
  STD_TORCH_CHECK(parts.size() == totals.size(), op, ": ", parts.size(), " parts for ",
                  totals.size(), " totals");
  Sums sums;
  std::unordered_map<void*, std::pair<size_t, int64_t>> known;  // a total's place and length
  known.reserve(totals.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    check_device(op, "part", i, parts[i], totals[0]);
    check_device(op, "total", i, totals[i], totals[0]);
    const int64_t length = totals[i].numel();
    STD_TORCH_CHECK(parts[i].numel() == length, op, ": part ", i, " has ", parts[i].numel(),
                    " numbers, its total ", length);
    STD_TORCH_CHECK(parts[i].scalar_type() == parts[0].scalar_type() &&
                        totals[i].scalar_type() == totals[0].scalar_type(),
                    op, ": pair ", i, " is of other types than the first");
    STD_TORCH_CHECK(parts[i].is_contiguous() && totals[i].is_contiguous(), op, ": pair ", i,
                    " is not contiguous");
    if (length == 0) continue;
    void* total = totals[i].mutable_data_ptr();
    const auto [entry, is_new] = known.try_emplace(total, sums.list.size(), length);
    const auto [place, known_length] = entry->second;
    STD_TORCH_CHECK(length == known_length, op, ": total ", i, " shares memory with another");
    if (is_new) {
      sums.list.push_back({total, {}});
      sums.ends.push_back(sums.length() + length);
    }
    sums.list[place].parts.push_back(parts[i].const_data_ptr());
  }
  return sums;
}

}  // namespace moesys
