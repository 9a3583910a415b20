// A parameter matrix as left operand of products: in place where its words lie side by side along the sum, else kRows
// rows of it at a time in a buffer.
#pragma once

#include "host.h"
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

// Elements of a buffer for k columns. Copied rows stand this far apart: an odd number of cache lines, or nearly.
MACARON_INLINE int64_t apart(int64_t k) { return round_up(k, 32) + 16; }
MACARON_INLINE int64_t packed_size(int64_t k) { return kRows * apart(k); }

// kRows neighbours (a row stride of 1) at a time: whole cache lines instead of one word of each.
MACARON_INLINE void pack_words(const float* p, int64_t row, int64_t col, int64_t rows, int64_t k, float* out) {
  if (row == 1 && rows == kRows) {
    for (int64_t j = 0; j < k; ++j) std::memcpy(out + j * kRows, p + j * col, kRows * sizeof(float));
    return;
  }
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * kRows + i] = p[i * row + j * col];
}
MACARON_INLINE void pack_words(const bf16* p, int64_t row, int64_t col, int64_t rows, int64_t k, float* out) {
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * kRows + i] = to_float(p[i * row + j * col]);
}
MACARON_INLINE void pack_words(const bf16* p, int64_t row, int64_t col, int64_t rows, int64_t k, bf16* out) {
  for (int64_t j = 0; j < k; j += 2, out += 2 * kRows) {
#if defined(__AVX512BF16__)
    if (row == 1 && j + 1 < k && rows == kRows) {  // 12 neighbours of two rows, interleaved
      constexpr __mmask16 some = (1 << kRows) - 1;
      const __m256i first = _mm256_maskz_loadu_epi16(some, p + j * col);
      const __m256i second = _mm256_maskz_loadu_epi16(some, p + (j + 1) * col);
      const VecU pairs = (VecU)_mm512_maskz_cvtepu16_epi32(some, first) |
                         (VecU)_mm512_maskz_cvtepu16_epi32(some, second) << 16;
      _mm512_mask_storeu_epi32(out, some, (__m512i)pairs);
      continue;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) {
      out[2 * i] = p[i * row + j * col];
      out[2 * i + 1] = j + 1 < k ? p[i * row + (j + 1) * col] : bf16{0};
    }
  }
}

enum class Source { in_place, copied, packed };

// Rows a multiple of a page apart are copied where several panels pass by: all of a tile's rows would go through one set
// of the L1 cache, which has fewer lines than they are.
template <class W>
MACARON_INLINE Source source_of(const Weight<W>& w, int64_t k, int64_t panels) {
  if (sizeof(W) != sizeof(Packed<W>) || w.col != 1 || k % kElements<Word<W>> != 0) return Source::packed;
  return panels > 1 && w.row * int64_t(sizeof(W)) % 4096 == 0 ? Source::copied : Source::in_place;
}

// Rows i ... i + rows and columns k0 ... k0 + k of a weight; `buffer` holds packed_size(k) elements. A transposed weight
// is packed too: its words stand a row of the weight apart, often all in one set of the cache.
template <class W>
MACARON_INLINE Left<Packed<W>> left_of(const Weight<W>& w, Source source, int64_t i, int64_t rows, int64_t k0, int64_t k,
                                       Packed<W>* buffer) {
  constexpr int step = kElements<Word<W>>;
  const W* p = w.p + i * w.row + k0 * w.col;
  if constexpr (sizeof(W) == sizeof(Packed<W>)) {
    if (source == Source::in_place) return {p, w.row, step, k / step};
    if (source == Source::copied) {
      for (int64_t r = 0; r < rows; ++r) std::memcpy(buffer + r * apart(k), p + r * w.row, size_t(k) * sizeof(W));
      return {buffer, apart(k), step, k / step};
    }
  }
  pack_words(p, w.row, w.col, rows, k, buffer);
  return {buffer, step, step * kRows, ceil_div(k, step)};
}

constexpr int64_t kPanelBytes = 256 << 10;   // of right operands that stay in the L2 cache while weights pass by
constexpr int64_t kPackedBytes = 512 << 10;  // of packed weights that a thread holds at a time

// body(i, rows, left, p) for tiles of kRows rows of `weights` (one, or two side by side: left[0], left[1]) and each of
// `panels` panels of k features. Threads divide the rows; each of them packs its rows once.
template <int count, class W, class Body>
static void each_tile(const Host& host, const Weight<W> (&weights)[count], int64_t rows, int64_t k0, int64_t k,
                      int64_t panels, const Body& body) {
  const int64_t together = larger<int64_t>(kPanelBytes / (4 * kPanel * ceil_div(k, kElements<Word<W>>) + 1), 1);
  const Source source = source_of(weights[0], k, panels);
  const bool lies = source == Source::in_place;
  const int64_t packed_bytes = count * packed_size(k) * int64_t(sizeof(Packed<W>));
  int64_t most = ceil_div(rows, kRows);
  if (source == Source::packed) most = larger<int64_t>(kPackedBytes / packed_bytes, 1);
  if (source == Source::copied) most = 1;  // right before they are read
  parallel(host, ceil_div(rows, kRows), [&](int64_t first_tile, int64_t last_tile) {
    const int64_t held = smaller(most, last_tile - first_tile);
    const Buffer<Packed<W>> packed(host, lies ? 0 : held * count * packed_size(k));
    const Buffer<Left<Packed<W>>> lefts(host, held * count);
    const int64_t at_a_time = source == Source::copied ? together : panels;
    for (int64_t p0 = 0; p0 < panels; p0 += at_a_time)
      for (int64_t begin = first_tile; begin < last_tile; begin += held) {
        const int64_t end = smaller(begin + held, last_tile);
        for (int64_t b = begin; b < end; ++b)
          for (int w = 0; w < count; ++w) {
            const int64_t at = (b - begin) * count + w, i = b * kRows;
            lefts[at] = left_of(weights[w], source, i, smaller<int64_t>(kRows, rows - i), k0, k,
                                packed + at * packed_size(k));
          }
        for (int64_t p1 = p0; p1 < smaller(p0 + at_a_time, panels); p1 += together)
          for (int64_t b = begin; b < end; ++b) {
            Left<Packed<W>> left[count];
            for (int w = 0; w < count; ++w) {
              left[w] = lefts[(b - begin) * count + w];
              left[w].ahead = lies ? kRows * weights[w].row : 0;  // the first panel fetches the next rows
            }
            for (int64_t p = p1; p < smaller(p1 + together, panels); ++p) {
              body(b * kRows, smaller<int64_t>(kRows, rows - b * kRows), left, p);
              for (int w = 0; w < count; ++w) left[w].ahead = 0;
            }
          }
      }
  });
}

}  // namespace macaron_ops::MACARON_OPS_ISA
