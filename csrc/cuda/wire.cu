// moesys::pack and moesys::unpack: rows of numbers to rows of bytes and back. N rows, D numbers
// each, W bytes on the wire: D codes, then the fp32 scale of each block of columns. The same bytes
// as on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cassert>

#include "../checks.h"
#include "../low_precision.h"
#include "launch.cuh"

namespace moesys {
namespace {

// One warp per task: a row, or `stride` rows one after the other that hand on what rounding took
// (`carries`: D numbers for each task, zeros at first; null = nothing is handed on).
template <typename T, typename Format>
__global__ void pack_rows(const T* __restrict__ x, const int64_t* __restrict__ slot_of_row,
                          uint8_t* __restrict__ out, float* __restrict__ carries, Wire wire,
                          int64_t K, int64_t num_slots, bool is_stochastic, bool is_checked,
                          int64_t stride, int64_t N, int64_t num_tasks) {
  const int64_t task = warp_index();
  if (task >= num_tasks) return;
  const int64_t W = wire.row_bytes();
  float* carry = carries ? carries + task * wire.D : nullptr;
  for (int64_t n = task * stride; n < min(N, (task + 1) * stride); ++n) {
    uint8_t* row = out + n * W;
    const int64_t slot = slot_of_row[n];
    assert(slot >= -1 && slot < num_slots);
    if (slot < 0) {
      for (int64_t i = lane_index(); i < W; i += WARP) row[i] = 0;
      continue;
    }
    const T* from = x + slot / K * wire.D;
    for (int64_t b = 0; b < wire.num_blocks; ++b) {
      const int64_t start = b * wire.block, end = min(wire.D, start + wire.block);
      float largest = 0;
      bool is_finite = true;
      for (int64_t d = start + lane_index(); d < end; d += WARP) {
        const float value = static_cast<float>(from[d]);
        is_finite = is_finite && isfinite(value);
        largest = fmaxf(largest, fabsf(value));
      }
      is_finite = __all_sync(ALL_LANES, is_finite);
      assert(is_finite || !is_checked);
      for (int offset = WARP / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
      const float scale = is_finite ? scale_of<Format>(largest) : NO_SCALE;
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      const uint32_t key = noise_key(scale, static_cast<uint32_t>(n), static_cast<uint32_t>(b));
      // All lanes to the end: neighbours exchange codes.
      for (int64_t first = start; first < end; first += WARP) {
        const int64_t d = first + lane_index();
        uint8_t code = 0;
        if (d < end && is_finite) {
          const float own = static_cast<float>(from[d]);
          const float value = carry ? with_carry<Format>(own, carry[d], scale) : own;
          // Not fused with the sums that follow: the CPU rounds in between.
          const float scaled = __fmul_rn(value, inverse);
          const float chance = is_stochastic ? noise(key, static_cast<uint32_t>(d - start)) : 0.0f;
          code = Format::encode(scaled, chance);
          if (carry) carry[d] += value - __fmul_rn(Format::decode(code), scale);
        }
        if constexpr (Format::CODES_PER_BYTE == 1) {
          if (d < end) row[d] = code;
        } else {
          // Two in a byte, the even column in its low half; a block begins at an even one.
          const uint32_t next = __shfl_down_sync(ALL_LANES, static_cast<uint32_t>(code), 1);
          if (d < end && d % 2 == 0) row[d / 2] = static_cast<uint8_t>(code | next << 4);
        }
      }
      if (lane_index() < 4) {
        const uint32_t bits = __float_as_uint(scale);
        row[wire.code_bytes() + b * 4 + lane_index()] =
            static_cast<uint8_t>(bits >> (8 * lane_index()));
      }
    }
  }
}

template <typename T, typename Format>
__global__ void unpack_rows(const uint8_t* __restrict__ bytes, T* __restrict__ rows, Wire wire,
                            int64_t N) {
  const int64_t n = warp_index();
  if (n >= N) return;
  const uint8_t* row = bytes + n * wire.row_bytes();
  for (int64_t b = 0; b < wire.num_blocks; ++b) {
    const int64_t start = b * wire.block, end = min(wire.D, start + wire.block);
    const uint8_t* at = row + wire.code_bytes() + b * 4;
    const float scale =
        __uint_as_float(at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24);
    for (int64_t d = start + lane_index(); d < end; d += WARP) {
      constexpr int PER_BYTE = Format::CODES_PER_BYTE;
      const uint8_t code = PER_BYTE == 1 ? row[d] : row[d / 2] >> (d % 2 ? 4 : 0) & 15;
      rows[n * wire.D + d] = static_cast<T>(Format::decode(code) * scale);
    }
  }
}

Tensor pack(const Tensor& x_any, const Tensor& slot_of_row_any, int64_t K, int64_t format,
            int64_t block, bool is_stochastic, int64_t carried_rows, bool is_checked) {
  const Wire wire = check_pack(x_any, slot_of_row_any, K, block, codes_per_byte("pack", format));
  const Launch launch(x_any);
  const auto [x, slot_of_row] = contiguous(x_any, slot_of_row_any);
  const int64_t N = slot_of_row.size(0);
  const int64_t stride = carried_rows > 0 ? carried_rows : 1;
  const int64_t num_tasks = (N + stride - 1) / stride;
  Tensor bytes = torch::stable::new_empty(x, {N, wire.row_bytes()}, ScalarType::Byte);
  Tensor carries =
      torch::stable::new_zeros(x, {carried_rows > 0 ? num_tasks * wire.D : 0}, ScalarType::Float);
  float* carry = carried_rows > 0 ? carries.mutable_data_ptr<float>() : nullptr;
  for_format("pack", format, [&]<typename Format>() {
    for_float_type("pack", x, [&]<typename Element>() {
      launch.warp_per_item(&pack_rows<Element, Format>, num_tasks, x.const_data_ptr<Element>(),
                           slot_of_row.const_data_ptr<int64_t>(), bytes.mutable_data_ptr<uint8_t>(),
                           carry, wire, K, x.size(0) * K, is_stochastic, is_checked, stride, N);
    });
  });
  return bytes;
}

Tensor unpack(const Tensor& bytes_any, const Tensor& like, int64_t D, int64_t format,
              int64_t block) {
  const Wire wire = check_unpack(bytes_any, D, block, codes_per_byte("unpack", format));
  const Launch launch(bytes_any);
  const Tensor bytes = torch::stable::contiguous(bytes_any);
  const int64_t N = bytes.size(0);
  Tensor rows = torch::stable::new_empty(like, {N, D});
  for_format("unpack", format, [&]<typename Format>() {
    for_float_type("unpack", like, [&]<typename Element>() {
      launch.warp_per_item(&unpack_rows<Element, Format>, N, bytes.const_data_ptr<uint8_t>(),
                           rows.mutable_data_ptr<Element>(), wire);
    });
  });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace moesys
