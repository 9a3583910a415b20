// A parameter matrix as left operand of products: in place where its words lie as the tile kernel reads them, else
// packed for kRows rows.
#pragma once

#include "product.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Element (i, k) stands at p + i row + k col.
template <class W>
struct Weight {
  const W* p;
  int64_t row, col;
};

template <class W>
using Packed = typename Arithmetic<Word<W>>::Element;

// Elements of a buffer that packs k columns.
MACARON_INLINE int64_t packed_size(int64_t k) { return kRows * (k + 1); }

MACARON_INLINE void pack_words(const bf16* p, int64_t row, int64_t col, int64_t rows, int64_t k, float* out) {
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * kRows + i] = to_float(p[i * row + j * col]);
}
MACARON_INLINE void pack_words(const bf16* p, int64_t row, int64_t col, int64_t rows, int64_t k, bf16* out) {
  for (int64_t j = 0; j < k; j += 2, out += 2 * kRows) {
#if defined(__AVX512BF16__)
    if (row == 1 && j + 1 < k && rows == kRows) {  // 12 neighbours of two rows, interleaved
      VecH first = {}, second = {};
      std::memcpy(&first, p + j * col, kRows * sizeof(bf16));
      std::memcpy(&second, p + (j + 1) * col, kRows * sizeof(bf16));
      const VecU pairs = __builtin_convertvector(first, VecU) | __builtin_convertvector(second, VecU) << 16;
      std::memcpy(out, &pairs, kRows * sizeof(pairs[0]));
      continue;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) {
      out[2 * i] = p[i * row + j * col];
      out[2 * i + 1] = j + 1 < k ? p[i * row + (j + 1) * col] : bf16{0};
    }
  }
}

// Rows i ... i + rows and columns k0 ... k0 + k of a weight; `buffer` holds packed_size(k) elements.
template <class W>
MACARON_INLINE Left<Packed<W>> left_of(const Weight<W>& w, int64_t i, int64_t rows, int64_t k0, int64_t k,
                                       Packed<W>* buffer) {
  constexpr int step = kElements<Word<W>>;
  const W* p = w.p + i * w.row + k0 * w.col;
  if constexpr (sizeof(W) == sizeof(Packed<W>))
    if (step == 1 || (w.col == 1 && k % step == 0)) return {p, w.row, step * w.col, k / step};
  if constexpr (sizeof(W) == 2) {
    pack_words(p, w.row, w.col, rows, k, buffer);
    return {buffer, step, step * kRows, ceil_div(k, step)};
  }
  __builtin_unreachable();
}

}  // namespace macaron_ops::MACARON_OPS_ISA
