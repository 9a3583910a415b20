// Between rows (tokens, as tensors hold them) and panels (transposed, as products want them).
//
//   panel    [ceil(width / kElements)][kPanel] words: lanes are the tokens of one panel, zeros beyond the last one
//   columns  [ceil(width / kPanel)][tokens / kElements][kPanel] words: lanes are features, so that a product contracts
//            over tokens; what the gradients of weights need
//   elements [panel][width][kPanel] elements: tokens side by side, a left operand that contracts over them
#pragma once

#include "norm.h"
#include "product.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <class WordT>
MACARON_INLINE int64_t words_of(int64_t elements) { return ceil_div(elements, kElements<WordT>); }

// Two vectors that are neighbours along the contraction as one of words; a float word is the first alone.
MACARON_INLINE void store_words(float* p, Vec first, Vec) { store(p, first); }
MACARON_INLINE void store_words(Pair* p, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  constexpr uint32_t step = 0x10001;  // from one pair of places to the next, of `first` and `second` side by side
  const VecU places = 0x100000u + step * (VecU)counting();
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  store_bits(&p->bits, (VecU)_mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)places, halves));
#else
  store_bits(&p->bits, rounded_bits(first) | rounded_bits(second) << 16);
#endif
}

// One tile, kLanes tokens by kLanes features: r[i] holds the features c ... of token i.
template <class WordT>
MACARON_INLINE void tile_to_columns(const Vec* r, int64_t token, int64_t tokens, int64_t c, WordT* columns) {
  constexpr int step = kElements<WordT>;
  WordT* block = columns + (c / kPanel * (tokens / step) + token / step) * kPanel + c % kPanel;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += step) store_words(block + i / step * kPanel, r[i], r[i + step - 1]);
}
template <class WordT>
MACARON_INLINE void tile_to_panel(Vec* r, int64_t lane, int64_t c, int64_t width, WordT* panel) {
  constexpr int step = kElements<WordT>;
  transpose(r);
  const int64_t valid = smaller<int64_t>(kLanes, width - c);
  if (valid == kLanes) {
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j += step)
      store_words(panel + (c + j) / step * kPanel + lane, r[j], r[j + step - 1]);
  } else {
    for (int j = 0; j < valid; j += step)
      store_words(panel + (c + j) / step * kPanel + lane, r[j], j + step - 1 < valid ? r[j + step - 1] : Vec{});
  }
}

// Rows to a panel, and to columns where these are not null (`token`: their first row there, of `tokens`).
// element(i, c, n) gives the features c ... c + kLanes of row i, of which n are there (zeros beyond). Their sums over the
// rows are added to `sums` (width,) where that is not null.
template <class WordT, class Element>
static void fill_panel(int64_t count, int64_t width, WordT* panel, WordT* columns, int64_t token, int64_t tokens,
                       const Element& element, float* sums = nullptr) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i)
        r[i] = lane + i < count ? element(lane + i, c, smaller<int64_t>(kLanes, width - c)) : Vec{};
      if (sums != nullptr) store_part(sums + c, load_part(sums + c, width - c) + sum_of<kLanes>(r), width - c);
      if (columns != nullptr) tile_to_columns(r, token + lane, tokens, c, columns);
      if (panel != nullptr) tile_to_panel(r, lane, c, width, panel);
    }
    if (columns != nullptr)  // a block of columns is whole: what lies beyond the width is read, never used
      for (int64_t c = round_up(width, kLanes); c < round_up(width, kPanel); c += kLanes) {
        const Vec r[kLanes] = {};
        tile_to_columns(r, token + lane, tokens, c, columns);
      }
  }
}

// The elements of one panel of pairs.
static inline void panel_to_elements(const Pair* panel, int64_t width, bf16* elements) {
  for (int64_t c = 0; c < width; c += 2, panel += kPanel)
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      VecU pairs;
      std::memcpy(&pairs, panel + lane, sizeof pairs);
      const VecH first = __builtin_convertvector(pairs & 0xffffu, VecH), second = __builtin_convertvector(pairs >> 16, VecH);
      std::memcpy(elements + c * kPanel + lane, &first, sizeof first);
      if (c + 1 < width) std::memcpy(elements + (c + 1) * kPanel + lane, &second, sizeof second);
    }
}

// The panel of N(x).
template <class WordT, class X>
static void normalize_to_panel(const X* x, int64_t count, int64_t width, const Norm& norm, WordT* panel,
                               WordT* columns = nullptr, int64_t token = 0, int64_t tokens = 0) {
  Statistics stats[kPanel];
  for (int64_t i = 0; i < count; ++i) stats[i] = statistics(x + i * width, width, norm);
  fill_panel(count, width, panel, columns, token, tokens, [&](int64_t i, int64_t c, int64_t n) {
    return normalized(load_part(x + i * width + c, n), stats[i], norm, c, width);
  });
}

// A panel of floats [width][kPanel] to rows: write(i, c, v, n) gets n features c ... of row i.
template <class Write>
static void panel_to_rows(const float* panel, int64_t count, int64_t width, const Write& write) {
  for (int64_t lane = 0; lane < count; lane += kLanes)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t n = smaller<int64_t>(kLanes, width - c);
      Vec r[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) r[j] = j < n ? load(panel + (c + j) * kPanel + lane) : Vec{};
      transpose(r);
      for (int i = 0; i < smaller<int64_t>(kLanes, count - lane); ++i) write(lane + i, c, r[i], n);
    }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
