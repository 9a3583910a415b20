// The activations of macaron_ops/reference/activation.py that are functions of one number.
#pragma once

#include "device.h"
#include "operators.h"

namespace macaron_ops::cuda {

MACARON_DEVICE float activate(float h, Activation activation) {
  switch (activation) {
    case Activation::relu: return h < 0.f ? 0.f : h;  // NaN stays
    case Activation::gelu: return 0.5f * h * (1.f + erff(h * 0.70710678118654752f));
    case Activation::gelu_tanh: return 0.5f * h * (1.f + tanhf(0.79788456080286536f * (h + 0.044715f * h * h * h)));
    default: return h / (1.f + expf(-h));
  }
}

// d act(h) / dh
MACARON_DEVICE float slope(float h, Activation activation) {
  switch (activation) {
    case Activation::relu: return h > 0.f ? 1.f : 0.f;
    case Activation::gelu:
      return 0.5f * (1.f + erff(h * 0.70710678118654752f)) + h * 0.39894228040143268f * expf(-0.5f * h * h);
    case Activation::gelu_tanh: {
      const float t = tanhf(0.79788456080286536f * (h + 0.044715f * h * h * h));
      return 0.5f * (1.f + t) + 0.5f * h * (1.f - t * t) * 0.79788456080286536f * (1.f + 0.134145f * h * h);
    }
    default: {
      const float s = 1.f / (1.f + expf(-h));
      return s * (1.f + h * (1.f - s));
    }
  }
}

}  // namespace macaron_ops::cuda
