// Arithmetic of one SwiGLU element, the same for the CPU and CUDA kernels.
#pragma once

#include "exponential.h"

namespace moesys {

template <typename A>
MOESYS_INLINE A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

template <typename A>
MOESYS_INLINE A swiglu_forward(A gate, A up) {
  return gate * sigmoid(gate) * up;
}

template <typename A>
struct GateUp {
  A gate, up;
};

template <typename A>
MOESYS_INLINE GateUp<A> swiglu_gradient(A grad_hidden, A gate, A up) {
  const A s = sigmoid(gate);
  return {grad_hidden * up * s * (A(1) + gate * (A(1) - s)), grad_hidden * gate * s};
}

}  // namespace moesys
