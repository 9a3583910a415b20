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

}  // namespace macaron_ops::cuda
