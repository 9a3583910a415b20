// 2^t on vectors, within about one ulp. One polynomial of degree 5, whose error is 8e-8 relative, and the exponent.
#pragma once

#include "math.h"

namespace macaron_ops::MACARON_OPS_ISA {

#if defined(__AVX512F__)

// Any t: 0 far below, inf from 128 on; NaN stays. The machine takes the fraction and scales, so that nothing is clamped.
MACARON_INLINE Vec exp2(Vec t) {
  const float c[] = {0.99999994f, 0.69315308f, 0.24015361f, 0.055826318f, 0.0089893406f, 0.0018775767f};
  const Vec fraction = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)t, 1);  // t - floor(t); 0 where t is infinite
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)polynomial(fraction, c), (__m512)t);
}
MACARON_INLINE Vec exp2_in_range(Vec t) { return exp2(t); }

#else

struct Exp2Parts {
  Vec power;  // 2^(t - whole)
  VecI whole;
};

// |t| < 2^22.
MACARON_INLINE Exp2Parts exp2_parts(Vec t) {
  const float c[] = {1.f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
  const Vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec shifted = t + shifter;
  return {polynomial(t - (shifted - shifter), c), (VecI)(bits_of(shifted) - 0x4b400000u)};
}

// Any t: 0 far below, inf from 128 on; NaN stays.
MACARON_INLINE Vec exp2(Vec t) {
  const Exp2Parts parts = exp2_parts(at_most(at_least(t, broadcast(-252.f)), broadcast(252.f)));
  // In two steps, because 2^whole alone leaves the exponent's range before the result does.
  const VecI half = parts.whole >> 1;
  const auto power = [](VecI n) { return of_bits((VecU)(n + 127) << 23); };
  return parts.power * power(half) * power(parts.whole - half);
}

// No NaN, t below 127; what is less than 2^-126 is 2^-126 instead.
MACARON_INLINE Vec exp2_in_range(Vec t) {
  const Exp2Parts parts = exp2_parts(at_least(t, broadcast(-126.f)));
  return of_bits(bits_of(parts.power) + ((VecU)parts.whole << 23));
}

#endif

}  // namespace macaron_ops::MACARON_OPS_ISA
