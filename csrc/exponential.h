// exp for kernels of both devices.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MOESYS_INLINE __host__ __device__ __forceinline__
#else
#define MOESYS_INLINE inline __attribute__((always_inline))
#endif

namespace moesys {

// Branch-free, so that a loop of it becomes SIMD code: exp(x) = 2^n exp(r), n = round(x / ln 2),
// |r| <= ln(2) / 2, and exp(r) = 1 + r + r^2 q(r) with q interpolated at Chebyshev nodes (1e-8).
// Overflows to inf and underflows to 0 as expf does; NaN stays NaN.
MOESYS_INLINE float exp_polynomial(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 104.0f ? 104.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const float q = 0.5f + r * (0.1666657695f +
                              r * (4.166655457e-2f + r * (8.363185032e-3f + r * 1.392619106e-3f)));
  const float exp_r = 1.0f + (r + r * r * q);
  // 2^n in two factors, so that neither leaves the range of normal numbers.
  const int32_t bits = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(magic);
  const int32_t half = bits >> 1;
  const float scale_a = std::bit_cast<float>((half + 127) << 23);
  const float scale_b = std::bit_cast<float>((bits - half + 127) << 23);
  return exp_r * scale_a * scale_b;
}

MOESYS_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);  // shorter there than the polynomial, and as accurate
#else
  return exp_polynomial(x);
#endif
}

MOESYS_INLINE double exponential(double x) { return exp(x); }

}  // namespace moesys
