// The operands of matrix products on panels (product.h): what a word is, and how a left operand lies.
#pragma once

#include "vec.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int kPanel = 32;  // lanes of a panel
// Terms of a sum that are added one after the other.
constexpr int64_t kSegment = 240;      // features
constexpr int64_t kTokenSegment = 128;  // tokens, a whole panel at least; pairs of bf16 are less exact themselves
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kChain = kSegment;
#else
constexpr int64_t kChain = 8;  // of a segment, where products are rounded before they are added
#endif
constexpr int64_t kShortChain = 8;
static_assert(kSegment % kChain == 0 && kSegment % kShortChain == 0);
// Of a product of weights that give `features` with the `tokens` of a call. Of few of either the chains are short: libraries
// sum such products along the vectors, in many chains, and are as exact as that. It is those of the call that count, not
// those of a panel: a backward pass that computes the product again, with other tokens beside them, has to find the same
// bits.
MACARON_INLINE int64_t chain_for(int64_t tokens, int64_t features) {
  return smaller(tokens, features) <= kPanel / 2 ? kShortChain : kChain;
}
#if defined(__AVX512F__)
constexpr int kVectorRows = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kVecs = 2;         // vectors of a tile
#elif defined(__AVX2__)
constexpr int kVectorRows = 6;  // 6 x 2 accumulators of 16 registers
constexpr int kVecs = 2;
#else
constexpr int kVectorRows = 6;
constexpr int kVecs = 2;
#endif

struct Pair {  // two bf16, the first one in the lower half
  uint32_t bits;
};

// What the panels of a product with weights of type W hold.
template <class W>
struct WordOf {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct WordOf<bf16> {
  using Type = Pair;
};
#endif
template <class W>
using Word = typename WordOf<W>::Type;

// How many elements along k a word holds.
template <class WordT>
constexpr int kElements = 1;
template <>
inline constexpr int kElements<Pair> = 2;

// Whether products of such words go through the tile registers of AMX (amx.h), and how many rows a product computes at
// a time.
template <class WordT>
constexpr bool kAmx = false;
#if defined(__AMX_BF16__)
template <>
inline constexpr bool kAmx<Pair> = true;
#endif
template <class WordT>
constexpr int kRows = kAmx<WordT> ? 32 : kVectorRows;

// A machine with AMX has 2 MiB of L2 cache a core, and an L3 cache that is far away: weights are to be read once for more
// tokens.
#if defined(__AMX_BF16__)
constexpr bool kLargeL2 = true;
#else
constexpr bool kLargeL2 = false;
#endif

template <class WordT>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  using Element = float;
  using Operand = Vec;
  MACARON_INLINE Operand load(const float* p) { return MACARON_OPS_ISA::load(p); }
  MACARON_INLINE Operand broadcast(const float* p) { return MACARON_OPS_ISA::broadcast(*p); }
  MACARON_INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<Pair> {
  using Element = bf16;
  using Operand = __m512i;
  MACARON_INLINE Operand load(const Pair* p) { return _mm512_loadu_si512(p); }
  MACARON_INLINE Operand broadcast(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  MACARON_INLINE Vec multiply_add(Vec sum, Operand a, Operand b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
template <>
struct Arithmetic<Pair> {  // a type alone: nothing multiplies pairs here
  using Element = bf16;
};
#endif

// The left operand as a tile reads it, in elements: row i, word k of run r stands at p + i row + k step + r jump. One of
// row and step is that of neighbouring words.
template <class Element>
struct Left {
  const Element* p;
  int64_t row, step;
  int64_t words;     // of a run
  int64_t runs = 1;  // how many runs follow one another along k
  int64_t jump = 0;
  int64_t ahead = 0;  // from a row to the one that will be read next in its place, to be fetched meanwhile; 0: not known

  Left rows_from(int64_t i) const {
    Left left = *this;
    left.p += i * row;
    return left;
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA
