// The activations of macaron_ops/reference/activation.py for results that are rounded to 16 bits, with few instructions:
// what an epilogue computes takes turns with the products of another tile.
//
//   gelu        z Phi(z)            Phi by Abramowitz and Stegun's formula 7.1.26 for erf, whose error of 1.5e-7 is a
//                                   thousandth of the rounding; its exponential is the derivative's too
//   gelu_tanh   z sigmoid(2 k (z + 0.044715 z^3)),  k = sqrt(2 / pi)
//   silu        z sigmoid(z)
#pragma once

#include <type_traits>

#include "device.h"
#include "operators.h"

namespace macaron_ops::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kTanhScale = 2.f * 0.7978845608028654f;  // of z, in the sigmoid of gelu_tanh
constexpr float kTanhCubic = 0.044715f;

MACARON_DEVICE float reciprocal(float x) {  // within an ulp
#ifdef MACARON_OPS_CUDA_ON_HOST
  return 1.f / x;
#else
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

// Phi(z), and bell = e^(-z^2 / 2).
MACARON_DEVICE float normal(float z, float& bell) {
  constexpr float kSlope = 0.3275911f * 0.70710678f;
  bell = exp2_of(z * z * (-0.5f * kLog2e));
  const float t = reciprocal(1.f + fabsf(z) * kSlope);
  // The formula's coefficients, halved: 1 - Phi(|z|).
  const float sum = 0.5f * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = t * sum * bell;
  return z < 0.f ? tail : 1.f - tail;
}
MACARON_DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_of(x * -kLog2e)); }
// Its derivative as a product: 1 - sigmoid(x) would lose its digits.
MACARON_DEVICE float sigmoid(float x, float& slope) {
  const float e = exp2_of(fabsf(x) * -kLog2e), r = reciprocal(1.f + e);
  slope = e * r * r;
  return x < 0.f ? e * r : r;
}

template <Activation A>
MACARON_DEVICE float activate16(float z) {
  if constexpr (A == Activation::relu) return z <= 0.f ? 0.f : z;  // NaN stays
  if constexpr (A == Activation::gelu) {
    float bell;
    return z * normal(z, bell);
  }
  if constexpr (A == Activation::gelu_tanh) return z * sigmoid(kTanhScale * (z + kTanhCubic * z * z * z));
  return z * sigmoid(z);
}

// act(z) and grad act'(z). relu's may have act(z) instead of z.
template <Activation A>
MACARON_DEVICE float activate16(float z, float grad, float& grad_z) {
  if constexpr (A == Activation::relu) {
    grad_z = z <= 0.f ? 0.f : grad;
    return z <= 0.f ? 0.f : z;
  }
  if constexpr (A == Activation::gelu) {
    float bell;
    const float phi = normal(z, bell);
    grad_z = grad * (phi + z * bell * 0.3989422804014327f);
    return z * phi;
  }
  float slope;
  if constexpr (A == Activation::gelu_tanh) {
    const float s = sigmoid(kTanhScale * (z + kTanhCubic * z * z * z), slope);
    grad_z = grad * (s + z * slope * kTanhScale * (1.f + 3.f * kTanhCubic * z * z));
    return z * s;
  }
  const float s = sigmoid(z, slope);
  grad_z = grad * (s + z * slope);
  return z * s;
}

// work(std::integral_constant<Activation, ...>{}) for an activation.
template <class Work>
MACARON_DEVICE void with_activation(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::relu: return work(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu: return work(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return work(std::integral_constant<Activation, Activation::gelu_tanh>{});
    default: return work(std::integral_constant<Activation, Activation::silu>{});
  }
}

}  // namespace macaron_ops::cuda
