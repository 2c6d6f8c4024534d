// A fp32 matrix product by panels of 64 columns: C[m, n] = sum_k A[m, k] B[k, n].
//
// B's panel is packed into [k][64], so that each step of k loads four vectors and multiplies them
// by one broadcast element of each of six rows of A: 24 sums stay in registers (Goto and van de
// Geijn, 2008). A is read where it lies, by its strides, so products with either operand transposed
// need no copy of it. Faster than a general library where the matrices of experts are small.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace moesys::panel {

constexpr int64_t LANES = 16;
constexpr int64_t VECTORS = 4;
constexpr int64_t WIDTH = LANES * VECTORS;
constexpr int64_t TILE_ROWS = 6;
constexpr int64_t UNPACKED_ROWS = 4 * TILE_ROWS;
// Sizes for a second-level cache of 1 MiB: of k at once (a panel is 128 KiB), panels that share the
// rows of A while they are there, and those rows (96 KiB).
constexpr int64_t DEPTH = 512;
constexpr int64_t PANELS = 4;
constexpr int64_t CHUNK_ROWS = 8 * TILE_ROWS;
constexpr int64_t PACKED = DEPTH * (PANELS * WIDTH + CHUNK_ROWS);

using Vector = float __attribute__((vector_size(LANES * sizeof(float)), may_alias));
using Unaligned = float __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
using Lanes = int __attribute__((vector_size(LANES * sizeof(int))));

struct Strided {
  const float* data;
  int64_t row, column;  // elements from one to the next

  Strided at(int64_t r, int64_t c) const { return {data + r * row + c * column, row, column}; }
};

// C[0..ROWS, 0..width) = A panel, or += with `add`.
template <int ROWS>
inline __attribute__((always_inline)) void tile(Strided a, const float* panel, int64_t stride,
                                                int64_t depth, float* c, int64_t c_row,
                                                int64_t width, bool add) {
  Vector sums[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const auto* b = reinterpret_cast<const Unaligned*>(panel + k * stride);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const float factor = a.data[m * a.row + k * a.column];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += factor * b[v];
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    float* row = c + m * c_row;
    if (width == WIDTH) {
      for (int v = 0; v < VECTORS; ++v) {
        auto* out = reinterpret_cast<Unaligned*>(row + v * LANES);
        *out = add ? *out + sums[m][v] : sums[m][v];
      }
    } else {
      const auto* sum = reinterpret_cast<const float*>(sums[m]);
      for (int64_t j = 0; j < width; ++j) row[j] = add ? row[j] + sum[j] : sum[j];
    }
  }
}

MOESYS_SIMD void multiply(Strided a, int64_t rows, const float* panel, int64_t stride,
                          int64_t depth, float* c, int64_t c_row, int64_t width, bool add) {
  int64_t m = 0;
  for (; m + TILE_ROWS <= rows; m += TILE_ROWS)
    tile<TILE_ROWS>(a.at(m, 0), panel, stride, depth, c + m * c_row, c_row, width, add);
  a = a.at(m, 0);
  c += m * c_row;
  switch (rows - m) {
    case 5:
      return tile<5>(a, panel, stride, depth, c, c_row, width, add);
    case 4:
      return tile<4>(a, panel, stride, depth, c, c_row, width, add);
    case 3:
      return tile<3>(a, panel, stride, depth, c, c_row, width, add);
    case 2:
      return tile<2>(a, panel, stride, depth, c, c_row, width, add);
    case 1:
      return tile<1>(a, panel, stride, depth, c, c_row, width, add);
    default:
      return;
  }
}

// One step of a transposition of 16 x 16: swaps the off-diagonal blocks of size STEP.
template <int STEP>
inline __attribute__((always_inline)) void swap_blocks(Vector* rows) {
  Lanes low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & STEP ? LANES + (i ^ STEP) : i;
    high[i] = i & STEP ? LANES + i : i ^ STEP;
  }
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Vector x = rows[i], y = rows[i | STEP];
    rows[i] = __builtin_shuffle(x, y, low);
    rows[i | STEP] = __builtin_shuffle(x, y, high);
  }
}

// panel[k][j] = b[k, j] for j < width, 0 up to WIDTH: no sum meets garbage, whose denormals are
// slow. One of b's strides is 1.
MOESYS_SIMD void pack(Strided b, int64_t depth, int64_t width, float* panel) {
  if (width < WIDTH) std::fill(panel, panel + depth * WIDTH, 0.0f);
  const int64_t whole = width / LANES * LANES;
  if (b.column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = b.data + k * b.row;
      float* to = panel + k * WIDTH;
      for (int64_t j = 0; j < whole; j += LANES)
        *reinterpret_cast<Vector*>(to + j) = *reinterpret_cast<const Unaligned*>(from + j);
      for (int64_t j = whole; j < width; ++j) to[j] = from[j];
    }
    return;
  }
  for (int64_t j = 0; j < whole; j += LANES) {
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
      Vector rows[LANES];
      for (int i = 0; i < LANES; ++i)
        rows[i] = *reinterpret_cast<const Unaligned*>(b.data + (j + i) * b.column + k);
      swap_blocks<8>(rows);
      swap_blocks<4>(rows);
      swap_blocks<2>(rows);
      swap_blocks<1>(rows);
      for (int i = 0; i < LANES; ++i)
        *reinterpret_cast<Vector*>(panel + (k + i) * WIDTH + j) = rows[i];
    }
    for (; k < depth; ++k)
      for (int64_t i = j; i < j + LANES; ++i) panel[k * WIDTH + i] = b.data[i * b.column + k];
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = whole; j < width; ++j) panel[k * WIDTH + j] = b.data[j * b.column + k];
}

// C[0..rows, 0..columns) = A B, columns <= PANELS * WIDTH; zeros where depth is 0. `packed`: PANELS
// * WIDTH * DEPTH floats on a 64-byte boundary.
inline void product(Strided a, int64_t rows, Strided b, int64_t depth, float* c, int64_t c_row,
                    int64_t columns, float* packed) {
  int64_t k = 0;
  do {
    const int64_t step = std::min(DEPTH, depth - k);
    const float* panels[PANELS];
    int64_t strides[PANELS];
    for (int64_t p = 0; p * WIDTH < columns; ++p) {
      const Strided from = b.at(k, p * WIDTH);
      const int64_t width = std::min(WIDTH, columns - p * WIDTH);
      // Few rows are done before a panel would be packed.
      const bool is_panel = b.column == 1 && width == WIDTH && rows <= UNPACKED_ROWS;
      float* to = packed + p * WIDTH * DEPTH;
      if (!is_panel) pack(from, step, width, to);
      panels[p] = is_panel ? from.data : to;
      strides[p] = is_panel ? from.row : WIDTH;
    }
    for (int64_t m = 0; m < rows; m += CHUNK_ROWS) {
      const int64_t count = std::min(CHUNK_ROWS, rows - m);
      Strided chunk = a.at(m, k);
      if (a.row == 1) {
        // Columns of a wide matrix lie a power of two apart and share few lines of the caches.
        float* to = packed + PANELS * WIDTH * DEPTH;
        for (int64_t i = 0; i < step; ++i)
          std::copy_n(chunk.data + i * chunk.column, count, to + i * CHUNK_ROWS);
        chunk = {to, 1, CHUNK_ROWS};
      }
      for (int64_t p = 0; p * WIDTH < columns; ++p)
        multiply(chunk, count, panels[p], strides[p], step, c + m * c_row + p * WIDTH, c_row,
                 std::min(WIDTH, columns - p * WIDTH), k > 0);
    }
    k += step;
  } while (k < depth);
}

}  // namespace moesys::panel
