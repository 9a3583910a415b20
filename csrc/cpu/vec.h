// Vectors of the instruction set that a unit is compiled for, written with the compiler's vector extensions.
//
// Everything here has internal linkage in a namespace of its own per instruction set. Kernel units use no std::
// templates: the linker keeps one copy of each, and could keep one that only some machines can execute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

namespace macaron_ops::MACARON_OPS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

#define MACARON_INLINE static inline __attribute__((always_inline))

template <class T>
MACARON_INLINE T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
MACARON_INLINE T larger(T a, T b) { return a < b ? b : a; }
MACARON_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MACARON_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

MACARON_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 is x for every x; x + 0 is not (-0)
MACARON_INLINE VecU broadcast_bits(uint32_t x) { return x - VecU{}; }
// x, a product, rounded to float: keeps the compiler from fusing it with the sum that it goes into.
MACARON_INLINE Vec rounded(Vec x) {
#if defined(MACARON_OPS_EMULATED)  // csrc/emulated
  asm("" : "+m"(x));
#elif defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
template <size_t... j>
MACARON_INLINE VecI counting_of(IndexSequence<j...>) { return VecI{int32_t(j)...}; }
MACARON_INLINE VecI counting() { return counting_of(MakeIndexSequence<kLanes>{}); }  // 0, 1, 2, ...
MACARON_INLINE VecU bits_of(Vec x) { return (VecU)x; }
MACARON_INLINE Vec of_bits(VecU x) { return (Vec)x; }
MACARON_INLINE Vec choose(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
// Both keep a NaN in x, as torch.clamp and torch.maximum do.
MACARON_INLINE Vec at_least(Vec x, Vec low) { return choose(x < low, low, x); }
MACARON_INLINE Vec at_most(Vec x, Vec high) { return choose(x > high, high, x); }
MACARON_INLINE Vec absolute(Vec x) { return of_bits(bits_of(x) & 0x7fffffffu); }
MACARON_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  return of_bits((bits_of(magnitude) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// x in the first `count` lanes, 0 in the others, whatever stood there.
MACARON_INLINE Vec first_of(Vec x, int64_t count) {
  return count >= kLanes ? x : choose(counting() < int32_t(count), x, Vec{});
}

template <int apart, size_t... j>
MACARON_INLINE Vec swapped(Vec x, IndexSequence<j...>) { return __builtin_shufflevector(x, x, int(j) ^ apart...); }
template <int apart = kLanes / 2>
MACARON_INLINE float sum(Vec x) {  // pairwise
  x += swapped<apart>(x, MakeIndexSequence<kLanes>{});
  if constexpr (apart > 1) return sum<apart / 2>(x);
  else return x[0];
}
template <int count>
MACARON_INLINE Vec sum_of(const Vec* v) {  // of several vectors, pairwise
  if constexpr (count == 1) return v[0];
  else return sum_of<count / 2>(v) + sum_of<count - count / 2>(v + count / 2);
}
MACARON_INLINE float largest(Vec x) {
  float s = x[0];
  for (int i = 1; i < kLanes; ++i) s = x[i] > s || x[i] != x[i] ? x[i] : s;
  return s;
}

// -- bfloat16: the upper half of a float, rounded to nearest even ----------------------------------------------------

MACARON_INLINE float to_float(float x) { return x; }
MACARON_INLINE float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Where the machine multiplies bf16 it rounds to them, too, and takes denormal numbers for zeros in both.
#if defined(__AVX512BF16__)
MACARON_INLINE __m256i rounded_halves(Vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
MACARON_INLINE VecU rounded_bits(Vec x) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, rounded_halves(x)); }
#else
MACARON_INLINE VecU rounded_bits(Vec x) {  // the bf16 of each lane in the lane's lower half
  const VecU u = bits_of(x);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x == x ? rounded : broadcast_bits(0x7fc0u);
}
#endif
MACARON_INLINE bf16 to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fc0u)};
}
template <class T>
MACARON_INLINE T to(float x) {
  if constexpr (sizeof(T) == 2) return to_bf16(x);
  else return x;
}

// -- memory: any alignment; loads and stores of part of a vector touch no byte beyond it -----------------------------

MACARON_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MACARON_INLINE Vec load(const bf16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return of_bits(__builtin_convertvector(h, VecU) << 16);
}
MACARON_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
MACARON_INLINE void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256i h = rounded_halves(v);
#else
  const VecH h = __builtin_convertvector(rounded_bits(v), VecH);
#endif
  std::memcpy(p, &h, sizeof h);
}
MACARON_INLINE void store_bits(uint32_t* p, VecU v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
MACARON_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1u);
}
MACARON_INLINE Vec load_part(const float* p, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
MACARON_INLINE Vec load_part(const bf16* p, int64_t count) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return of_bits((VecU)_mm512_maskz_cvtepu16_epi32(0xffff, h) << 16);
}
MACARON_INLINE void store_part(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}
MACARON_INLINE void store_part(bf16* p, Vec v, int64_t count) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(p, first_lanes(count), rounded_halves(v));
#else
  _mm512_mask_cvtepi32_storeu_epi16(p, first_lanes(count), (__m512i)rounded_bits(v));
#endif
}
#else
template <class T>
MACARON_INLINE Vec load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
MACARON_INLINE void store_part(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}
#endif

// -- transposition of kLanes vectors: log2(kLanes) exchanges of off-diagonal blocks ----------------------------------

template <int block, size_t... j>
MACARON_INLINE void exchange(Vec& x, Vec& y, IndexSequence<j...>) {
  const Vec a = x, b = y;
  x = __builtin_shufflevector(a, b, (int(j) & block ? kLanes + int(j) - block : int(j))...);
  y = __builtin_shufflevector(a, b, (int(j) & block ? kLanes + int(j) : int(j) + block)...);
}
template <int block = 1>
MACARON_INLINE void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & block)) exchange<block>(rows[i], rows[i + block], MakeIndexSequence<kLanes>{});
  if constexpr (2 * block < kLanes) transpose<2 * block>(rows);
}

}  // namespace macaron_ops::MACARON_OPS_ISA
