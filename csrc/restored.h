// Arithmetic of what a token gets from its row, and of a hash's vertex, the same for the CPU and
// CUDA kernels.
#pragma once

#include "exponential.h"

namespace moesys {

// What the experts made of the row's mean, moved by how far the token is from it.
template <typename A>
MOESYS_INLINE A restored(A row, A slope, A x, A mean) {
  return row + slope * (x - mean);
}

// The code of the vertex of a cross-polytope at this place, on the side of `value`.
template <typename A>
MOESYS_INLINE int64_t vertex_code(int64_t place, A value) {
  return 2 * place + (value < A(0));
}

}  // namespace moesys
