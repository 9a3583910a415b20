// Matrix products on panels: C[i][lane] (+)= sum_k A[i][k] B[k][lane].
//
// A panel is [k][kPanel] of words, contiguous: kPanel tokens (or features) side by side in the lanes of vectors. A word
// is a float, or where the machine multiplies pairs of bf16 the two that follow one another along k. A is read one word
// at a time and broadcast, from wherever it lies: a weight stays as nn.Linear keeps it, no copy of it is ever made,
// except for bf16 weights whose pairs do not lie side by side (or have to become floats): those are packed kRows rows
// at a time, and used for all panels of a block.
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
static_assert(kSegment % kChain == 0);
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kVecs = 2;   // vectors of a tile
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 6 x 2 accumulators of 16 registers
constexpr int kVecs = 2;
#else
constexpr int kRows = 6;
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

// c[i][lane] (+)= sum over k, for `rows` rows and `vecs` vectors. Accumulators live in registers. The words of a
// row are neighbours, or else those of a column: with one stride known all addresses are bases and one index.
template <class WordT, int rows, int vecs, bool by_rows>
static void tile(const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b, int64_t ldb, float* c,
                 int64_t ldc, bool accumulate) {
  using Do = Arithmetic<WordT>;
  constexpr int word = kElements<WordT>;
  Vec sums[rows][vecs];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) sums[i][v] = Vec{};
  const int64_t row = by_rows ? a.row : word, step = by_rows ? word : a.step;
  for (int64_t run = 0; run < a.runs; ++run) {
    // One pointer serves three rows (p, p + row, p + 2 row are one address mode), so that all stay in registers.
    constexpr int share = by_rows ? 3 : rows, groups = (rows + share - 1) / share;
    const typename Do::Element* at[groups];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) at[g] = a.p + run * a.jump + share * g * row;
    for (int64_t stop = 0; stop < a.words;) {
      int64_t k = stop;
      stop = a.words;
      if (by_rows && a.ahead != 0) {  // a cache line of each row: rows are too short for the machine to foresee the next
        stop = smaller<int64_t>(k + 16, a.words);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) __builtin_prefetch(at[i / share] + (i % share) * row + a.ahead, 0, 2);
      }
      for (; k < stop; ++k) {
        typename Do::Operand lanes[vecs];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) lanes[v] = Do::load(b + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
          const auto scalar = Do::broadcast(at[i / share] + (i % share) * row);
#pragma GCC unroll 4
          for (int v = 0; v < vecs; ++v) sums[i][v] = Do::multiply_add(sums[i][v], scalar, lanes[v]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < groups; ++g) at[g] += step;
        b += ldb;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      float* at = c + i * ldc + v * kLanes;
      store(at, accumulate ? load(at) + sums[i][v] : sums[i][v]);
    }
}

template <class WordT, int vecs, int rows = kRows>
MACARON_INLINE void tile_of(int64_t count, const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b,
                            int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (count == rows) {
    const bool by_rows = a.step == kElements<WordT>;
    return (by_rows ? tile<WordT, rows, vecs, true> : tile<WordT, rows, vecs, false>)(a, b, ldb, c, ldc, accumulate);
  }
  if constexpr (rows > 1) tile_of<WordT, vecs, rows - 1>(count, a, b, ldb, c, ldc, accumulate);
}

// At most kRows rows and kPanel lanes, of which the first `lanes` (rounded up to vectors) are computed. Long sums are
// added up in segments: their rounding errors grow with the length of a segment, not with that of the sum.
template <class WordT>
static void tile_rows(int64_t rows, const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b, int64_t ldb,
                      int64_t lanes, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t words = kChain / kElements<WordT>;
  const int64_t runs = a.words > words ? 1 : kTokenSegment / kPanel * (kElements<WordT> > 1 ? 2 : 1);
  Left<typename Arithmetic<WordT>::Element> part = a;
  for (int64_t run = 0; run < a.runs; run += runs)
    for (int64_t word = 0; word < a.words; word += words) {
      part.words = smaller(words, a.words - word);
      part.runs = smaller<int64_t>(runs, a.runs - run);
      part.p = a.p + run * a.jump + word * a.step;
      const WordT* from = b + (run * a.words + word) * ldb;
      const bool add = accumulate || run > 0 || word > 0;
      int64_t v = 0;
      for (; v + kVecs * kLanes <= round_up(lanes, kLanes); v += kVecs * kLanes)
        tile_of<WordT, kVecs>(rows, part, from + v, ldb, c + v, ldc, add);
      for (; v < lanes; v += kLanes) tile_of<WordT, 1>(rows, part, from + v, ldb, c + v, ldc, add);
    }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
