// Numbers of eight and of four bits and how they are rounded, the same for the CPU and CUDA
// kernels.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "exponential.h"

namespace moesys {

// 32 well mixed bits of x (the finaliser of MurmurHash3).
MOESYS_INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Of one block of one row: its scale and place are all that its noise depends on, so no state is
// kept and the same numbers are always rounded in the same way.
MOESYS_INLINE uint32_t noise_key(float scale, uint32_t row, uint32_t block) {
  return mixed(std::bit_cast<uint32_t>(scale) + mixed(row * 0x9e3779b9u + block + 1u));
}

// Uniform in [-1/2, 1/2), of 24 bits.
MOESYS_INLINE float noise(uint32_t key, uint32_t column) {
  return static_cast<float>(static_cast<int32_t>(mixed(key + column * 0x85157af5u) >> 8)) *
             0x1p-24f -
         0.5f;
}

// To the nearest whole number, ties to even; |x| < 2^22.
MOESYS_INLINE float nearest(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
#endif
}

MOESYS_INLINE float clamped(float x, float most) {
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

// Two's complement, in the low bits of a code.
template <int BITS>
struct Int {
  static constexpr int CODES_PER_BYTE = 8 / BITS;
  static constexpr float MAX = (1 << (BITS - 1)) - 1;

  // `noise` is 0 for the nearest, else uniform in [-1/2, 1/2): then the mean of the code is x.
  static MOESYS_INLINE uint8_t encode(float x, float noise) {
    const int8_t code = static_cast<int8_t>(clamped(nearest(x + noise), MAX));
    return static_cast<uint8_t>(code) & ((1u << BITS) - 1u);
  }

  static MOESYS_INLINE float decode(uint8_t code) {
    constexpr int UNUSED = 8 - BITS;
    return static_cast<int8_t>(code << UNUSED) >> UNUSED;
  }

  // That between the codes around x, in units of x.
  static MOESYS_INLINE float step(float, float scale) { return scale; }
};

// Sign, EXPONENT bits of bias 2^(EXPONENT-1) - 1, MANTISSA bits; no code of infinity or NaN is ever
// made.
template <int EXPONENT, int MANTISSA>
struct Fp8 {
  static constexpr int CODES_PER_BYTE = 1;
  static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
  static constexpr int SMALLEST = 1 - BIAS - MANTISSA;  // of the numbers: 2^SMALLEST
  // e4m3fn has one NaN at the very end; e5m2 keeps the last exponent for infinity and NaN.
  static constexpr float MAX = EXPONENT == 4 ? 448.0f : 57344.0f;

  static MOESYS_INLINE uint8_t encode(float x, float noise) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    // Neighbours of x are 2^step apart.
    int32_t step = static_cast<int32_t>((bits >> 23) & 0xff) - 127 - MANTISSA;
    step = step < SMALLEST ? SMALLEST : step;
    const float quantum = std::bit_cast<float>(static_cast<uint32_t>(step + 127) << 23);
    const float per_quantum = std::bit_cast<float>(static_cast<uint32_t>(127 - step) << 23);
    const float value = clamped(nearest(x * per_quantum + noise) * quantum, MAX);
    const uint32_t rounded = std::bit_cast<uint32_t>(value) & 0x7fffffffu;
    const uint32_t normal = (rounded >> (23 - MANTISSA)) - ((127u - BIAS) << MANTISSA);
    const float least = std::bit_cast<float>(static_cast<uint32_t>(127 - SMALLEST) << 23);
    const uint32_t subnormal =
        static_cast<uint32_t>(static_cast<int32_t>(std::bit_cast<float>(rounded) * least));
    const bool is_normal = rounded >= (128u - BIAS) << 23;
    const uint32_t sign = value < 0.0f ? 0x80u : 0u;  // zero has none
    return static_cast<uint8_t>(sign | (is_normal ? normal : subnormal));
  }

  static MOESYS_INLINE float decode(uint8_t code) {
    const uint32_t magnitude = code & 0x7fu;
    const float quantum = std::bit_cast<float>(static_cast<uint32_t>(127 + SMALLEST) << 23);
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * quantum;
    const float normal =
        std::bit_cast<float>((magnitude << (23 - MANTISSA)) + ((127u - BIAS) << 23));
    const float value = magnitude >> MANTISSA ? normal : subnormal;
    return code & 0x80u ? -value : value;
  }

  // That between the codes around x, or half of it: its exact power of two costs more to find.
  static MOESYS_INLINE float step(float x, float) { return std::abs(x) * (0.5f / (1 << MANTISSA)); }
};

using Int8 = Int<8>;
using Int4 = Int<4>;
using E4m3 = Fp8<4, 3>;
using E5m2 = Fp8<5, 2>;

// Calls kernel.template operator()<Format>() with the format of this number; moesys/ops/wire.py has
// their names.
template <typename Kernel>
auto for_format(const char* op, int64_t format, const Kernel& kernel) {
  switch (format) {
    case 0:
      return kernel.template operator()<Int8>();
    case 1:
      return kernel.template operator()<E4m3>();
    case 2:
      return kernel.template operator()<E5m2>();
    case 3:
      return kernel.template operator()<Int4>();
    default:
      STD_TORCH_CHECK(false, op, ": no format ", format);
  }
  __builtin_unreachable();
}

inline int64_t codes_per_byte(const char* op, int64_t format) {
  return for_format(op, format, []<typename Format>() { return int64_t{Format::CODES_PER_BYTE}; });
}

constexpr float FLOAT_MAX = std::numeric_limits<float>::max();
// The scale of a block that has a number that is not finite: all of it is read as NaN.
constexpr float NO_SCALE = std::numeric_limits<float>::quiet_NaN();

// A row's scale: its largest number becomes the format's. 0 for a row of (nearly) zeros.
template <typename Format>
MOESYS_INLINE float scale_of(float largest) {
  const float scale = largest / Format::MAX;
  return scale < 0x1p-120f ? 0.0f : scale;
}

// x and so much of `carry`, which rounding took from rows before, as is at most a step between x's
// own codes: more would be worse for x than its own rounding. The rest waits in `carry`.
template <typename Format>
MOESYS_INLINE float with_carry(float x, float& carry, float scale) {
  const float given = clamped(carry, Format::step(x, scale));
  carry -= given;
  return clamped(x + given, FLOAT_MAX);
}

}  // namespace moesys
