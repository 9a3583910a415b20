// Scores and attention weights of one block, in powers of two: p = 2^(s' - shift) with s' = s log2(e).
#pragma once

#include "dropout.h"
#include "masks.h"
#include "math.h"
#include "panel.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0, within about one ulp; 0 from -150 downwards, NaN stays NaN.
MACARON_INLINE Vec exp2_of_negative(Vec x) {
  const Vec t = at_least(x, broadcast(-150.f));
  const Vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec n = (t + shifter) - shifter, r = t - n;
  // Minimax fit for |r| <= 1/2, relative error 2e-9, with p(0) = 1.
  const float c[] = {1.f, 0.69314718f, 0.24022648f, 0.055503324f, 0.0096184369f, 0.0013398875f, 1.5353362e-4f};
  const Vec p = polynomial(r, c);
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // In two steps, because 2^n alone leaves the exponent's range before the result does.
  const Vec sane = choose(n == n, n, Vec{});  // the conversion of NaN to int is not defined
  const Vec half = __builtin_convertvector(__builtin_convertvector(sane * 0.5f, VecI), Vec);
  return p * power_of_two(half) * power_of_two(sane - half);
#endif
}

// Whole numbers side by side.
MACARON_INLINE VecI counting_from(int64_t start) {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = int32_t(start) + i;
  return v;
}

}  // namespace macaron_ops::MACARON_OPS_ISA
