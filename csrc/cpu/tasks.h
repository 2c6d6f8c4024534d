// How work is cut up.
#pragma once

#include <atomic>
#include <cstdint>

namespace moesys {

constexpr int64_t GRAIN_BYTES = 65536;
constexpr int64_t TILE = 256;  // accumulators that stay in the first-level cache

// Items for one thread at least, of so many bytes each.
inline int64_t grain(int64_t bytes_per_item) { return GRAIN_BYTES / (bytes_per_item + 1) + 1; }

// least = min(least, value), whichever thread is first.
inline void keep_least(std::atomic<int64_t>& least, int64_t value) {
  int64_t before = least.load();
  while (value < before && !least.compare_exchange_weak(before, value)) {
  }
}

}  // namespace moesys
