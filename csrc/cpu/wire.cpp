// moesys::pack and moesys::unpack: rows of numbers to rows of bytes and back. N rows, D numbers
// each, W bytes on the wire: D codes, then the fp32 scale of each block of columns.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../low_precision.h"
#include "simd.h"
#include "tasks.h"

namespace moesys {
namespace {

// values = row; returns the largest magnitude, or infinity where one is not finite.
template <typename T>
inline __attribute__((always_inline)) float load_row(float* __restrict values,
                                                     const T* __restrict row, int64_t D) {
  float largest = 0;
  int bad = 0;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) values[d] = static_cast<float>(widen(row[d]));
#pragma omp simd reduction(max : largest) reduction(| : bad)
  for (int64_t d = 0; d < D; ++d) {
    const float size = std::abs(values[d]);
    bad |= !(size <= FLOAT_MAX);
    largest = size > largest ? size : largest;
  }
  return bad ? std::numeric_limits<float>::infinity() : largest;
}

// Codes of one block, whose `values` are lost; with `carry`, what is waiting there is given to it,
// and what rounding takes from it added (`kept`: room for D numbers). A loop for each product: were
// it fused with the sum that follows, results would hang on the instruction set.
template <typename Format>
inline __attribute__((always_inline)) void encode_block(float* __restrict values, float scale,
                                                        bool is_stochastic, uint32_t key,
                                                        uint8_t* __restrict codes,
                                                        float* __restrict carry,
                                                        float* __restrict kept, int64_t D) {
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  if (carry) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) values[d] = with_carry<Format>(values[d], carry[d], scale);
    std::memcpy(kept, values, D * sizeof(float));
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) values[d] *= inverse;
  if (is_stochastic) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d)
      codes[d] = Format::encode(values[d], noise(key, static_cast<uint32_t>(d)));
  } else {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) codes[d] = Format::encode(values[d], 0.0f);
  }
  if (!carry) return;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) values[d] = Format::decode(codes[d]) * scale;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) carry[d] += kept[d] - values[d];
}

template <typename T, typename Format>
inline __attribute__((always_inline)) void decode_block(const uint8_t* __restrict codes,
                                                        float scale, T* __restrict row, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d)
    row[d] = narrow<T>(static_cast<accumulator_t<T>>(Format::decode(codes[d]) * scale));
}

// Codes of four bits, two in a byte, the even column in its low half.
inline __attribute__((always_inline)) void pair_codes(const uint8_t* __restrict codes,
                                                      uint8_t* __restrict bytes, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D / 2; ++i)
    bytes[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  if (D % 2) bytes[D / 2] = codes[D - 1];
}

inline __attribute__((always_inline)) void part_codes(const uint8_t* __restrict bytes,
                                                      uint8_t* __restrict codes, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D / 2; ++i) {
    codes[2 * i] = bytes[i] & 15;
    codes[2 * i + 1] = bytes[i] >> 4;
  }
  if (D % 2) codes[D - 1] = bytes[D / 2];
}

#define MOESYS_FORMAT(Format)                                                                     \
  MOESYS_SIMD void encode(Format, float* values, float scale, bool is_stochastic, uint32_t key,   \
                          uint8_t* codes, float* carry, float* kept, int64_t D) {                 \
    encode_block<Format>(values, scale, is_stochastic, key, codes, carry, kept, D);               \
  }                                                                                               \
  MOESYS_SIMD void decode(Format, const uint8_t* codes, float scale, float* row, int64_t D) {     \
    decode_block<float, Format>(codes, scale, row, D);                                            \
  }                                                                                               \
  MOESYS_SIMD void decode(Format, const uint8_t* codes, float scale, double* row, int64_t D) {    \
    decode_block<double, Format>(codes, scale, row, D);                                           \
  }                                                                                               \
  MOESYS_SIMD void decode(Format, const uint8_t* codes, float scale, c10::BFloat16* row,          \
                          int64_t D) {                                                            \
    decode_block<c10::BFloat16, Format>(codes, scale, row, D);                                    \
  }                                                                                               \
  MOESYS_SIMD void decode(Format, const uint8_t* codes, float scale, c10::Half* row, int64_t D) { \
    decode_block<c10::Half, Format>(codes, scale, row, D);                                        \
  }
MOESYS_FORMAT(Int8)
MOESYS_FORMAT(E4m3)
MOESYS_FORMAT(E5m2)
MOESYS_FORMAT(Int4)
#undef MOESYS_FORMAT

MOESYS_SIMD void pair(const uint8_t* codes, uint8_t* bytes, int64_t D) {
  pair_codes(codes, bytes, D);
}
MOESYS_SIMD void part(const uint8_t* bytes, uint8_t* codes, int64_t D) {
  part_codes(bytes, codes, D);
}

#define MOESYS_LOAD(T)                                             \
  MOESYS_SIMD float load(float* values, const T* row, int64_t D) { \
    return load_row<T>(values, row, D);                            \
  }
MOESYS_LOAD(float)
MOESYS_LOAD(double)
MOESYS_LOAD(c10::BFloat16)
MOESYS_LOAD(c10::Half)
#undef MOESYS_LOAD

Tensor pack(const Tensor& x_any, const Tensor& slot_of_row_any, int64_t K, int64_t format,
            int64_t block, bool is_stochastic, int64_t carried_rows, bool is_checked) {
  const Wire wire = check_pack(x_any, slot_of_row_any, K, block, codes_per_byte("pack", format));
  const auto [x, slot_of_row] = contiguous(x_any, slot_of_row_any);
  const int64_t N = slot_of_row.size(0), D = wire.D, W = wire.row_bytes(),
                num_slots = x.size(0) * K;
  Tensor bytes = torch::stable::new_empty(x, {N, W}, ScalarType::Byte);
  const int64_t* slot_of = slot_of_row.const_data_ptr<int64_t>();
  uint8_t* out = bytes.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> bad_slot{-2}, first_bad_row{N};
  // Rows that hand on what rounding took are one task.
  const int64_t stride = carried_rows > 0 ? carried_rows : 1;
  const int64_t num_tasks = (N + stride - 1) / stride;
  for_format("pack", format, [&]<typename Format>() {
    for_float_type("pack", x, [&]<typename Element>() {
      const Element* from = x.const_data_ptr<Element>();
      const int64_t bytes_per_task = stride * D * static_cast<int64_t>(sizeof(Element));
      torch::stable::parallel_for(
          0, num_tasks, grain(bytes_per_task), [&](int64_t begin, int64_t end) {
            constexpr int PER_BYTE = Format::CODES_PER_BYTE;
            std::vector<float> values(wire.block), carries(carried_rows > 0 ? D : 0),
                kept(carried_rows > 0 ? wire.block : 0);
            std::vector<uint8_t> codes(PER_BYTE > 1 ? wire.block : 0);
            for (int64_t task = begin; task < end; ++task) {
              std::fill(carries.begin(), carries.end(), 0.0f);
              for (int64_t n = task * stride; n < std::min(N, (task + 1) * stride); ++n) {
                uint8_t* row = out + n * W;
                const int64_t slot = slot_of[n];
                if (slot < 0 || slot >= num_slots) {
                  if (slot != -1) bad_slot = slot;
                  std::memset(row, 0, W);
                  continue;
                }
                for (int64_t b = 0; b < wire.num_blocks; ++b) {
                  const int64_t start = b * wire.block, width = std::min(wire.block, D - start);
                  const float largest = load(values.data(), from + slot / K * D + start, width);
                  uint8_t* bytes_of = row + start / PER_BYTE;
                  uint8_t* scale_bytes = row + wire.code_bytes() + b * 4;
                  if (largest > FLOAT_MAX) {
                    keep_least(first_bad_row, n);
                    std::memset(bytes_of, 0, (width + PER_BYTE - 1) / PER_BYTE);
                    std::memcpy(scale_bytes, &NO_SCALE, 4);
                    continue;
                  }
                  const float scale = scale_of<Format>(largest);
                  const uint32_t key =
                      noise_key(scale, static_cast<uint32_t>(n), static_cast<uint32_t>(b));
                  encode(Format{}, values.data(), scale, is_stochastic, key,
                         PER_BYTE > 1 ? codes.data() : bytes_of,
                         carries.empty() ? nullptr : carries.data() + start, kept.data(), width);
                  if (PER_BYTE > 1) pair(codes.data(), bytes_of, width);
                  std::memcpy(scale_bytes, &scale, 4);
                }
              }
            }
          });
    });
  });
  STD_TORCH_CHECK(bad_slot.load() == -2,
                  "pack: slot_of_row has an entry that is neither -1 nor a valid index");
  STD_TORCH_CHECK(!is_checked || first_bad_row.load() == N, "pack: row ", first_bad_row.load(),
                  " is not finite");
  return bytes;
}

Tensor unpack(const Tensor& bytes_any, const Tensor& like, int64_t D, int64_t format,
              int64_t block) {
  const Wire wire = check_unpack(bytes_any, D, block, codes_per_byte("unpack", format));
  const Tensor bytes = torch::stable::contiguous(bytes_any);
  const int64_t N = bytes.size(0), W = wire.row_bytes();
  Tensor rows = torch::stable::new_empty(like, {N, D});
  const uint8_t* in = bytes.const_data_ptr<uint8_t>();
  for_format("unpack", format, [&]<typename Format>() {
    for_float_type("unpack", like, [&]<typename Element>() {
      Element* to = rows.mutable_data_ptr<Element>();
      torch::stable::parallel_for(0, N, grain(W), [&](int64_t begin, int64_t end) {
        constexpr int PER_BYTE = Format::CODES_PER_BYTE;
        std::vector<uint8_t> codes(PER_BYTE > 1 ? wire.block : 0);
        for (int64_t n = begin; n < end; ++n) {
          for (int64_t b = 0; b < wire.num_blocks; ++b) {
            const int64_t start = b * wire.block, width = std::min(wire.block, D - start);
            const uint8_t* row = in + n * W;
            const uint8_t* bytes_of = row + start / PER_BYTE;
            float scale;
            std::memcpy(&scale, row + wire.code_bytes() + b * 4, 4);
            if (PER_BYTE > 1) part(bytes_of, codes.data(), width);
            decode(Format{}, PER_BYTE > 1 ? codes.data() : bytes_of, scale, to + n * D + start,
                   width);
          }
        }
      });
    });
  });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moesys, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace moesys
