// What the epilogues of product.h compute from a thread's part of a tile, without a header of CUTLASS: the tests' products on
// the CPU (host/products.cpp) compute it by the same code. A fragment is an array of kElements numbers in float32.
#pragma once

#include "../activation16.h"

namespace macaron_ops::cuda::sm90 {

// -- hidden ----------------------------------------------------------------------------------------------------------

struct ActivateArguments {
  Activation activation = Activation::relu;
};
template <class Fragment>
struct Activate {
  using Arguments = ActivateArguments;
  MACARON_DEVICE Fragment operator()(const Fragment& z, const Arguments& arguments) const {
    Fragment h;
    with_activation(arguments.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < Fragment::kElements; ++i) h[i] = activate16<decltype(activation)::value>(z[i]);
    });
    return h;
  }
};
template <>
struct Activate<float> {  // is asked what the arguments are
  using Arguments = ActivateArguments;
};

// -- residual --------------------------------------------------------------------------------------------------------

struct ResidualArguments {
  float a = 1.f, c = 1.f;
};
template <class Fragment>
struct Residual {
  using Arguments = ResidualArguments;
  MACARON_DEVICE Fragment operator()(const Fragment& sum, const Fragment& bias, const Fragment& x,
                                     const Arguments& arguments) const {
    Fragment y;
#pragma unroll
    for (int i = 0; i < Fragment::kElements; ++i) y[i] = arguments.a * x[i] + arguments.c * (sum[i] + bias[i]);
    return y;
  }
};
template <>
struct Residual<float> {
  using Arguments = ResidualArguments;
};

// -- backward --------------------------------------------------------------------------------------------------------

// h = act(z), and dz = c sums act'(z). One exponential serves both.
template <int N, class Sums, class Z, class Fragment>
MACARON_DEVICE void differentiate(Activation activation, float c, const Sums& sums, const Z& z, Fragment& h, Fragment& dz) {
  with_activation(activation, [&](auto name) {
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = activate16<decltype(name)::value>(float(z[i]), c * float(sums[i]), dz[i]);
  });
}

// Sums over the lanes that hold the same columns, in registers: lane i of kLanes, which lie 4 lanes of the warp apart, ends
// with the i-th of kLanes parts of the columns. In each turn it gives one half of what it has for the other.
template <int kLanes, int N>
MACARON_DEVICE void add_lanes(const float (&part)[N], float (&sums)[N / kLanes], int lane) {
  constexpr int kHalf = N / 2, kApart = kLanes / 2;
  const bool upper = (lane & kApart) != 0;
  float next[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float keep = upper ? part[i + kHalf] : part[i], give = upper ? part[i] : part[i + kHalf];
    next[i] = keep + __shfl_xor_sync(kWholeWarp, give, 4 * kApart);
  }
  if constexpr (kApart > 1) {
    add_lanes<kApart>(next, sums, lane);
  } else {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) sums[i] = next[i];
  }
}

}  // namespace macaron_ops::cuda::sm90
