// The FFN's activations and their gradients, as in macaron_ops/reference/activation.py.
#pragma once

#include "math.h"
#include "operators.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr float kSqrtHalf = 0.70710678f, kSqrtTwoOverPi = 0.79788456f, kCubic = 0.044715f;

MACARON_INLINE Sigmoid gelu_tanh_gate(Vec z) {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
  return sigmoid((2.f * kSqrtTwoOverPi) * (z + kCubic * (z * z * z)));
}

template <Activation a>
MACARON_INLINE Vec activate(Vec z) {
  if constexpr (a == Activation::relu) return at_least(z, Vec{});
  else if constexpr (a == Activation::gelu) return (0.5f * z) * (1.f + erf(z * kSqrtHalf));
  else if constexpr (a == Activation::gelu_tanh) return z * gelu_tanh_gate(z).value;
  else return z * sigmoid(z).value;
}

template <Activation a>
MACARON_INLINE Vec activate_backward(Vec grad, Vec z) {
  if constexpr (a == Activation::relu) {
    return choose(z <= 0.f, Vec{}, grad);
  } else if constexpr (a == Activation::gelu) {
    const Vec density = exp(-0.5f * (z * z)) * (0.5f * kSqrtTwoOverPi);
    return grad * (0.5f * (1.f + erf(z * kSqrtHalf)) + z * density);
  } else if constexpr (a == Activation::gelu_tanh) {
    const auto [s, rest] = gelu_tanh_gate(z);
    const Vec inner = (2.f * kSqrtTwoOverPi) * (1.f + (3.f * kCubic) * (z * z));
    return grad * (s + z * s * rest * inner);
  } else {
    const auto [s, rest] = sigmoid(z);
    return grad * (s * (1.f + z * rest));
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
