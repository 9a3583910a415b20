// Matrix products on panels: C[i][lane] (+)= sum_k A[i][k] B[k][lane].
//
// A panel is [k][kPanel] of words, contiguous: kPanel tokens (or features) side by side in the lanes of vectors. A word
// is a float, or where the machine multiplies pairs of bf16 the two that follow one another along k. A is read one word
// at a time and broadcast, from wherever it lies: a weight stays as nn.Linear keeps it, no copy of it is ever made,
// except for bf16 weights whose pairs do not lie side by side (or have to become floats): those are packed kRows rows
// at a time, and used for all panels of a block.
#pragma once

#include "amx.h"

namespace macaron_ops::MACARON_OPS_ISA {

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

template <class WordT, int vecs, int rows = kVectorRows>
MACARON_INLINE void tile_of(int64_t count, const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b,
                            int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (count == rows) {
    const bool by_rows = a.step == kElements<WordT>;
    return (by_rows ? tile<WordT, rows, vecs, true> : tile<WordT, rows, vecs, false>)(a, b, ldb, c, ldc, accumulate);
  }
  if constexpr (rows > 1) tile_of<WordT, vecs, rows - 1>(count, a, b, ldb, c, ldc, accumulate);
}

// At most kVectorRows rows and kPanel lanes, of which the first `lanes` (rounded up to vectors) are computed. Long sums
// are added up in segments: their rounding errors grow with the length of a segment, not with that of the sum.
template <class WordT>
static void vector_rows(int64_t rows, const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b, int64_t ldb,
                      int64_t lanes, float* c, int64_t ldc, bool accumulate, int64_t chain = kChain) {
  const int64_t words = chain / kElements<WordT>;
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

// The same for at most kRows rows, which take the tile registers of AMX where their words lie side by side along the sum:
// the caller holds a TileRegisters<WordT>.
template <class WordT>
static void tile_rows(int64_t rows, const Left<typename Arithmetic<WordT>::Element>& a, const WordT* b, int64_t ldb,
                      int64_t lanes, float* c, int64_t ldc, bool accumulate, int64_t chain = kChain) {
  if constexpr (kAmx<WordT>)
    if (a.step == kElements<WordT>) return amx_rows(rows, a, b, ldb, lanes, c, ldc, accumulate);
  for (int64_t i = 0; i < rows; i += kVectorRows)
    vector_rows(smaller<int64_t>(kVectorRows, rows - i), i == 0 ? a : a.rows_from(i), b, ldb, lanes, c + i * ldc, ldc,
                accumulate, chain);
}

}  // namespace macaron_ops::MACARON_OPS_ISA
