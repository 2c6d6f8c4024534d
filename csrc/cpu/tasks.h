// How work is cut up.
#pragma once

#include <cstdint>

namespace moesys {

constexpr int64_t GRAIN_BYTES = 65536;
constexpr int64_t TILE = 256;  // accumulators that stay in the first-level cache

// Items for one thread at least, of so many bytes each.
inline int64_t grain(int64_t bytes_per_item) { return GRAIN_BYTES / (bytes_per_item + 1) + 1; }

}  // namespace moesys
