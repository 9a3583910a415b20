// The AVX-512 instructions that csrc/cpu names, on any x86-64 with AVX2: included before a kernel's source, it makes the
// instruction sets avx512 and avx512_bf16 run where the machine has neither, so that they can be tested. The compiler
// splits the 64-byte vectors of vec.h by itself. An intrinsic that is not below does not compile: add it here.
//
// Bit for bit what Intel's manual says (Software Developer's Manual, volume 2), except for the payload of a NaN, the
// sign of the zero that reduce_ps leaves, and dpbf16_ps less than an ulp below the smallest normal number.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define MACARON_OPS_EMULATED 1  // no register holds a vector
#define __AVX512F__ 1
#if defined(MACARON_OPS_EMULATED_BF16)
#define __AVX512BF16__ 1
#endif

namespace macaron_ops::emulated {

#define MACARON_EMULATED static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(128)));
typedef int64_t DoubleBits __attribute__((vector_size(128)));

// -- memory: lanes that the mask leaves out are neither read nor written ---------------------------------------------

template <class Vector, class T>
MACARON_EMULATED Vector load(__mmask16 mask, const T* p) {
  Vector v = {};
  if (mask == 0xffff) std::memcpy(&v, p, sizeof v);
  else
    for (int i = 0; i < 16; ++i)
      if (mask >> i & 1) v[i] = p[i];
  return v;
}
template <class Vector, class T>
MACARON_EMULATED void store(__mmask16 mask, T* p, Vector v) {
  if (mask == 0xffff) std::memcpy(p, &v, sizeof v);
  else
    for (int i = 0; i < 16; ++i)
      if (mask >> i & 1) p[i] = v[i];
}
// What "maskz" means: zeros in the other lanes.
template <int lanes, class Vector>
MACARON_EMULATED Vector kept(uint32_t mask, Vector v) {
  if (mask + 1 != 1u << lanes)
    for (int i = 0; i < lanes; ++i)
      if (!(mask >> i & 1)) v[i] = 0;
  return v;
}

MACARON_EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  return (__m512)load<Floats>(mask, static_cast<const float*>(p));
}
MACARON_EMULATED __m256i maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return (__m256i)load<Shorts>(mask, static_cast<const uint16_t*>(p));
}
MACARON_EMULATED __m512i loadu_si512(const void* p) {
  return (__m512i)load<Words>(0xffff, static_cast<const uint32_t*>(p));
}
MACARON_EMULATED void mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  store(mask, static_cast<float*>(p), (Floats)v);
}
MACARON_EMULATED void mask_storeu_epi32(void* p, __mmask16 mask, __m512i v) {
  store(mask, static_cast<uint32_t*>(p), (Words)v);
}
MACARON_EMULATED void mask_cvtepi32_storeu_epi16(void* p, __mmask16 mask, __m512i v) {
  store(mask, static_cast<uint16_t*>(p), __builtin_convertvector((Words)v, Shorts));
}

// -- whole numbers ---------------------------------------------------------------------------------------------------

MACARON_EMULATED __m512i set1_epi32(int32_t x) { return (__m512i)(x - Ints{}); }
MACARON_EMULATED __m512i set1_epi64(int64_t x) { return (__m512i)(uint64_t(x) - Longs{}); }
MACARON_EMULATED __m512i maskz_cvtepu16_epi32(__mmask16 mask, __m256i v) {
  return (__m512i)kept<16>(mask, __builtin_convertvector((Shorts)v, Words));
}
MACARON_EMULATED __m512i maskz_mul_epu32(__mmask8 mask, __m512i a, __m512i b) {
  return (__m512i)kept<8>(mask, ((Longs)a & 0xffffffffu) * ((Longs)b & 0xffffffffu));
}

// -- floats ----------------------------------------------------------------------------------------------------------

// work(half, i) on both halves of 64 bytes.
template <class Work>
MACARON_EMULATED __m512 by_halves(__m512 v, const Work& work) {
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int i = 0; i < 2; ++i) halves[i] = work(halves[i], i);
  std::memcpy(&v, halves, sizeof v);
  return v;
}

MACARON_EMULATED Ints infinite(Floats x) { return (Ints)(((Words)x & 0x7fffffffu) == 0x7f800000u); }

// x minus the whole number that is nearest (0) or next below (1); 0 where x is infinite.
template <int rounding>
MACARON_EMULATED __m512 maskz_reduce_ps(__mmask16 mask, __m512 x) {
  static_assert(rounding == 0 || rounding == 1);
  const __m512 rest = by_halves(x, [](__m256 half, int) {
    const __m256 whole = _mm256_round_ps(half, rounding | _MM_FROUND_NO_EXC), rest = _mm256_sub_ps(half, whole);
    if constexpr (rounding == 0) return rest;  // exact
    // The difference is rounded like the whole number, downwards: that of -1/2 < x < 0, in [1/2, 1), is not exact.
    const __m256 above = _mm256_cmp_ps(_mm256_add_ps(rest, whole), half, _CMP_GT_OQ);
    return _mm256_sub_ps(rest, _mm256_and_ps(above, _mm256_set1_ps(0x1p-24f)));
  });
  return (__m512)kept<16>(mask, infinite((Floats)x) ? Floats{} : (Floats)rest);
}

// x 2^floor(n), rounded once. NaN where either is, or where it is 0 2^inf or inf 2^-inf; but of a NaN in x an infinite
// n makes inf or 0.
MACARON_EMULATED __m512 maskz_scalef_ps(__mmask16 mask, __m512 x_, __m512 n_) {
  const Floats x = (Floats)x_, n = (Floats)n_, most = Floats{} + 400.f, never = Floats{} + __builtin_nanf("");
  const Floats power = n > most ? most : n > -most ? n : n == n ? -most : Floats{};  // past these it is inf or 0
  const Ints toward_zero = __builtin_convertvector(power, Ints);
  const Ints whole = toward_zero + (Ints)(__builtin_convertvector(toward_zero, Floats) > power);  // true is -1
  const Doubles factor = (Doubles)((__builtin_convertvector(whole, DoubleBits) + 1023) << 52);
  Floats y = __builtin_convertvector(__builtin_convertvector(x, Doubles) * factor, Floats);
  const Ints endless = infinite(n), up = n > 0.f;
  y = n == n ? y : n;
  y = endless & (up ? x == 0.f : infinite(x)) ? never : y;
  y = x == x ? y : endless ? (up ? n : Floats{}) : x;
  return (__m512)kept<16>(mask, y);
}

// Denormal numbers as zeros of their sign.
MACARON_EMULATED __m256 flushed(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
  const __m256i denormal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srli_epi32(denormal, 1), bits));
}
// sum + a b of pairs of bf16: the upper ones, then the lower ones, each a fused multiply-add that rounds to nearest
// even, takes denormal numbers for zeros and makes zeros of them.
MACARON_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  __m256i left[2], right[2];
  std::memcpy(left, &a, sizeof a);
  std::memcpy(right, &b, sizeof b);
  return by_halves(sum, [&](__m256 half, int i) {
    const auto upper = [](__m256i pairs) {
      return flushed(_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536))));
    };
    const auto lower = [](__m256i pairs) { return flushed(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))); };
    half = flushed(_mm256_fmadd_ps(upper(left[i]), upper(right[i]), flushed(half)));
    return flushed(_mm256_fmadd_ps(lower(left[i]), lower(right[i]), half));
  });
}

// To bf16, to nearest even; denormal numbers become zeros, NaN a quiet one.
MACARON_EMULATED __m256bh cvtneps_pbh(__m512 x) {
  x = by_halves(x, [](__m256 half, int) { return flushed(half); });
  const Words bits = (Words)x, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Floats number = (Floats)x;
  return (__m256bh)__builtin_convertvector(number == number ? nearest : bits >> 16 | 0x40u, Shorts);
}
MACARON_EMULATED __m512bh cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const __m256bh halves[2] = {cvtneps_pbh(lower), cvtneps_pbh(upper)};
  __m512bh both;
  std::memcpy(&both, halves, sizeof both);
  return both;
}
MACARON_EMULATED __m512i maskz_permutexvar_epi16(uint32_t mask, __m512i places, __m512i x) {
  uint16_t from[32], at[32], to[32];
  std::memcpy(from, &x, sizeof x);
  std::memcpy(at, &places, sizeof places);
  for (int i = 0; i < 32; ++i) to[i] = mask >> i & 1 ? from[at[i] & 31] : 0;
  std::memcpy(&x, to, sizeof x);
  return x;
}
MACARON_EMULATED void mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  store(mask, static_cast<uint16_t*>(p), (Shorts)v);
}

}  // namespace macaron_ops::emulated

#undef _mm512_maskz_reduce_ps  // a macro itself where nothing is inlined
#undef _mm512_maskz_scalef_ps

#define _mm512_loadu_si512 macaron_ops::emulated::loadu_si512
#define _mm512_maskz_loadu_ps macaron_ops::emulated::maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 macaron_ops::emulated::maskz_loadu_epi16
#define _mm512_mask_storeu_ps macaron_ops::emulated::mask_storeu_ps
#define _mm512_mask_storeu_epi32 macaron_ops::emulated::mask_storeu_epi32
#define _mm512_mask_cvtepi32_storeu_epi16 macaron_ops::emulated::mask_cvtepi32_storeu_epi16
#define _mm512_set1_epi32 macaron_ops::emulated::set1_epi32
#define _mm512_set1_epi64 macaron_ops::emulated::set1_epi64
#define _mm512_maskz_cvtepu16_epi32 macaron_ops::emulated::maskz_cvtepu16_epi32
#define _mm512_maskz_mul_epu32 macaron_ops::emulated::maskz_mul_epu32
#define _mm512_maskz_reduce_ps(mask, x, rounding) macaron_ops::emulated::maskz_reduce_ps<rounding>(mask, x)
#define _mm512_maskz_scalef_ps macaron_ops::emulated::maskz_scalef_ps
#define _mm512_dpbf16_ps macaron_ops::emulated::dpbf16_ps
#define _mm512_cvtneps_pbh macaron_ops::emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh macaron_ops::emulated::cvtne2ps_pbh
#define _mm512_maskz_permutexvar_epi16 macaron_ops::emulated::maskz_permutexvar_epi16
#define _mm256_mask_storeu_epi16 macaron_ops::emulated::mask_storeu_epi16
