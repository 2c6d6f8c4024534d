// moesys::pack_chunks and moesys::add_chunks. Threads share out the numbers of all chunks, however
// these are cut.
#include "../chunks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace moesys {
namespace {

constexpr int64_t NEAR = 2048;    // numbers of a total that stay in the first-level cache
constexpr int64_t GRAIN = 32768;  // numbers for one thread at least: waking one costs as many

// Bits that keep their type stay as they are, those of a NaN too.
template <typename From, typename To>
inline __attribute__((always_inline)) To converted(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return narrow<To>(static_cast<accumulator_t<To>>(widen(value)));
  }
}

template <typename Part, typename Total>
inline __attribute__((always_inline)) Total sum_of(Total total, Part part) {
  using A = sum_t<Part, Total>;
  const A sum = static_cast<A>(widen(total)) + static_cast<A>(widen(part));
  return narrow<Total>(static_cast<accumulator_t<Total>>(sum));
}

#define MOESYS_FROM_TO(From, To)                                                             \
  MOESYS_SIMD void convert(const From* __restrict from, To* __restrict to, int64_t length) { \
    _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) {                               \
      to[i] = converted<From, To>(from[i]);                                                  \
    }                                                                                        \
  }                                                                                          \
  MOESYS_SIMD void add(const From* __restrict part, To* __restrict total, int64_t length) {  \
    _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) {                               \
      total[i] = sum_of<From, To>(total[i], part[i]);                                        \
    }                                                                                        \
  }
#define MOESYS_FROM(From)             \
  MOESYS_FROM_TO(From, float)         \
  MOESYS_FROM_TO(From, double)        \
  MOESYS_FROM_TO(From, c10::BFloat16) \
  MOESYS_FROM_TO(From, c10::Half)
MOESYS_FROM(float)
MOESYS_FROM(double)
MOESYS_FROM(c10::BFloat16)
MOESYS_FROM(c10::Half)
#undef MOESYS_FROM
#undef MOESYS_FROM_TO

// Calls piece(item, skip, length) for what lies in [begin, end) of items laid end to end.
template <typename Piece>
void for_pieces(const std::vector<int64_t>& ends, int64_t begin, int64_t end, const Piece& piece) {
  size_t item = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
  for (; begin < end; ++item) {
    const int64_t start = item == 0 ? 0 : ends[item - 1];
    const int64_t length = std::min(end, ends[item]) - begin;
    piece(item, begin - start, length);
    begin += length;
  }
}

Tensor pack_chunks(const std::vector<Tensor>& tensors, const Tensor& like) {
  const char* op = "pack_chunks";
  const Chunks chunks = chunks_of(op, tensors, like);
  Tensor out = torch::stable::new_empty(like, {chunks.length()});
  for_float_type(op, like, [&]<typename To>() {
    torch::stable::parallel_for(0, chunks.length(), GRAIN, [&](int64_t begin, int64_t end) {
      To* to = out.mutable_data_ptr<To>() + begin;
      for_pieces(chunks.ends, begin, end, [&](size_t i, int64_t skip, int64_t length) {
        for_float_type(op, chunks.list[i].type, [&]<typename From>() {
          convert(static_cast<const From*>(chunks.list[i].from) + skip, to, length);
        });
        to += length;
      });
    });
  });
  return out;
}

void add_chunks(const std::vector<Tensor>& parts, const std::vector<Tensor>& totals) {
  const char* op = "add_chunks";
  const Sums sums = sums_of(op, parts, totals);
  if (sums.list.empty()) return;
  for_float_type(op, parts[0], [&]<typename Part>() {
    for_float_type(op, totals[0], [&]<typename Total>() {
      torch::stable::parallel_for(0, sums.length(), GRAIN, [&](int64_t begin, int64_t end) {
        for_pieces(sums.ends, begin, end, [&](size_t i, int64_t skip, int64_t length) {
          const Sum& sum = sums.list[i];
          for (int64_t d = skip; d < skip + length; d += NEAR) {
            const int64_t width = std::min(NEAR, skip + length - d);
            for (const void* part : sum.parts)
              add(static_cast<const Part*>(part) + d, static_cast<Total*>(sum.total) + d, width);
          }
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("pack_chunks", TORCH_BOX(&pack_chunks));
  m.impl("add_chunks", TORCH_BOX(&add_chunks));
}

}  // namespace moesys
