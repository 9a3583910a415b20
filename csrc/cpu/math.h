// Elementary functions on vectors, within about one ulp of float32. NaN stays NaN; exp(-inf) is 0, exp(+inf) is inf.
// The coefficients are minimax fits of our own (weighted for relative error of the function).
#pragma once

#include "vec.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Of floats or doubles; compilers make one instruction of it, and a float's root is rounded once either way.
template <class V>
MACARON_INLINE V square_root(V x) {
  for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// Evaluates c[0] + c[1] x + ... by Horner's rule.
template <int n>
MACARON_INLINE Vec polynomial(Vec x, const float (&c)[n]) {
  Vec p = broadcast(c[n - 1]);
#pragma GCC unroll 8
  for (int i = n - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

// 2^n for whole n in [-126, 127].
MACARON_INLINE Vec power_of_two(Vec n) { return of_bits((VecU)(__builtin_convertvector(n, VecI) + 127) << 23); }

MACARON_INLINE Vec exp(Vec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2. Beyond the clamps the result is 0 or inf whatever x is.
  const Vec t = at_most(at_least(x, broadcast(-104.f)), broadcast(89.f));
  const Vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec n = (t * 1.44269504f + shifter) - shifter;
  const Vec r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact in n * part
  const float c[] = {0.49999994f, 0.16666521f, 0.041668389f, 0.0083687110f, 0.0013814610f};
  const Vec p = (polynomial(r, c) * (r * r) + r) + 1.f;
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // In two steps, because 2^n alone leaves the exponent's range before the result does.
  const Vec sane = choose(n == n, n, Vec{});  // the conversion of NaN to int is not defined
  const Vec half = __builtin_convertvector(__builtin_convertvector(sane * 0.5f, VecI), Vec);
  return p * power_of_two(half) * power_of_two(sane - half);
#endif
}

// sigmoid(x), and 1 - sigmoid(x) without cancellation.
struct Sigmoid {
  Vec value, rest;
};
MACARON_INLINE Sigmoid sigmoid(Vec x) {
  const Vec e = exp(-absolute(x));
  const Vec large = 1.f / (1.f + e), small = e * large;
  return {choose(x >= 0.f, large, small), choose(x >= 0.f, small, large)};
}

MACARON_INLINE Vec erf(Vec x) {
  const Vec t = absolute(x), s = x * x;
  const float near[] = {0.12837912f, -0.37612325f, 0.11280180f, -0.026711311f, 0.0049175513f, -5.6314224e-4f};
  const float far[] = {0.12849055f, 0.63579726f, 0.10515961f, -0.022825437f, 0.0031951133f, -2.1160777e-4f};
  const Vec small = polynomial(s, near) * x + x;  // |x| <= 1
  const Vec u = at_most(t, broadcast(4.f));       // erf(4) is 1 in float32
  const Vec large = with_sign_of(1.f - exp(-(polynomial(u, far) * u + u)), x);
  return choose(t <= 1.f, small, choose(x == x, large, x));
}

}  // namespace macaron_ops::MACARON_OPS_ISA
