// 2^t on vectors: one polynomial of degree 6, whose error is 2e-9 relative (degree 5 has 8e-8, which doubles the error of
// a weight), and the exponent. Within two thirds of an ulp where multiply-adds are fused.
#pragma once

#include "math.h"

namespace macaron_ops::MACARON_OPS_ISA {

#if defined(__AVX512F__)

// Any t: 0 far below, inf from 128 on; NaN stays. The machine takes the fraction and scales, so that nothing is clamped.
MACARON_INLINE Vec exp2(Vec t) {
  const float c[] = {1.f,          0.693147063f,   0.240229309f,  0.0554852821f,
                     0.00967545155f, 0.0012467847f, 0.000216129149f};
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
  const float c[] = {1.f,           0.693147182f,   0.240226477f,  0.0555033237f,
                     0.00961843692f, 0.00133988739f, 0.00015353362f};
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

// No NaN, t below 127; what is less than 2^-90 is 2^-90 instead: its products with small numbers are not denormal yet,
// which would be slow.
MACARON_INLINE Vec exp2_in_range(Vec t) {
  const Exp2Parts parts = exp2_parts(at_least(t, broadcast(-90.f)));
  return of_bits(bits_of(parts.power) + ((VecU)parts.whole << 23));
}

#endif

}  // namespace macaron_ops::MACARON_OPS_ISA
