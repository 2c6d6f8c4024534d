// Loops that become SIMD code. Functions marked MOESYS_SIMD are compiled once per instruction set
// and chosen when the library is loaded: one binary is fast on AVX-512 and AVX2, and runs without.
#pragma once

#include <bit>

#include "../element_types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOESYS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOESYS_SIMD
#endif

namespace moesys {

// Into the accumulator type and back, rounding to nearest even. bf16 is done on the bits: torch's
// own conversion branches on NaN, which keeps a loop scalar.
template <typename T>
inline __attribute__((always_inline)) accumulator_t<T> widen(T value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
  } else {
    return static_cast<accumulator_t<T>>(value);
  }
}

template <typename T>
inline __attribute__((always_inline)) T narrow(accumulator_t<T> value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return c10::BFloat16(static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded),
                         c10::BFloat16::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace moesys
