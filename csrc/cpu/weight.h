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
template <class WordT>
MACARON_INLINE int64_t apart(int64_t k) { return round_up(k, 32) + (kAmx<WordT> ? 32 : 16); }
template <class WordT>
MACARON_INLINE int64_t packed_size(int64_t k) { return kRows<WordT> * apart<WordT>(k); }

// The words of kVectorRows rows that stand at p + i row. Neighbours (a row stride of 1) are written by vectors where `whole`
// says that more of them follow; the words that follow in `out` replace the last lanes.
template <bool whole, class W>
MACARON_INLINE void pack_words(const W* p, int64_t row, int64_t, int64_t rows, float* out) {
  if constexpr (whole)
    for (int i = 0; i < kVectorRows; i += kLanes) store(out + i, load(p + i));
  else
    for (int64_t i = 0; i < rows; ++i) out[i] = to_float(p[i * row]);
}
// Pairs, whose second element stands `col` from the first; 0: there is none.
template <bool whole>
MACARON_INLINE void pack_words(const bf16* p, int64_t row, int64_t col, int64_t rows, bf16* out) {
#if defined(__AVX512BF16__)
  if (whole && col != 0) {  // 12 neighbours of two rows, interleaved
    constexpr __mmask16 some = (1 << kVectorRows) - 1;
    const __m256i first = _mm256_maskz_loadu_epi16(some, p), second = _mm256_maskz_loadu_epi16(some, p + col);
    const VecU pairs = (VecU)_mm512_maskz_cvtepu16_epi32(some, first) |
                       (VecU)_mm512_maskz_cvtepu16_epi32(some, second) << 16;
    _mm512_mask_storeu_epi32(out, some, (__m512i)pairs);
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    out[2 * i] = p[i * row];
    out[2 * i + 1] = col != 0 ? p[i * row + col] : bf16{0};
  }
}

enum class Source { in_place, copied, packed };

// Rows a multiple of a page apart are copied where several panels pass by and a tile has more rows than a set of the L1
// cache has lines: all would go through one. Where bf16 have to become floats, they do so row by row. A transposed
// weight is packed: its words stand a row of the weight apart, often all in one set of the cache.
template <class W>
MACARON_INLINE Source source_of(const Weight<W>& w, int64_t k, int64_t panels) {
  constexpr int ways = kLargeL2 ? 12 : 8;  // of an L1 cache of 48 or 32 KiB
  if (w.col != 1 || k % kElements<Word<W>> != 0) return Source::packed;
  if (sizeof(W) != sizeof(Packed<W>)) return Source::copied;
  if (kAmx<Word<W>>) return Source::in_place;  // a copy gains less than it costs
  return kVectorRows > ways && panels > 1 && w.row * int64_t(sizeof(W)) % 4096 == 0 ? Source::copied : Source::in_place;
}

// Rows i ... i + kRows and columns k0 ... k0 + k of a weight; `buffer` is where they were copied or packed.
template <class W>
MACARON_INLINE Left<Packed<W>> left_of(const Weight<W>& w, Source source, int64_t i, int64_t k0, int64_t k,
                                       const Packed<W>* buffer) {
  constexpr int step = kElements<Word<W>>;
  if (source == Source::packed && !kAmx<Word<W>>) return {buffer, step, step * kVectorRows, ceil_div(k, step)};
  if constexpr (sizeof(W) == sizeof(Packed<W>))
    if (source == Source::in_place) return {w.p + i * w.row + k0, w.row, step, k / step};
  return {buffer, apart<Word<W>>(k), step, ceil_div(k, step)};
}

// Rows begin ... end, kRows of them at a time, into buffers of packed_size(k) that stand `size` apart.
template <class W>
static void copy_rows(const Weight<W>& w, int64_t begin, int64_t end, int64_t k0, int64_t k, Packed<W>* buffer,
                      int64_t size) {
  constexpr int64_t rows = kRows<Word<W>>;
  for (int64_t i = begin; i < end; ++i) {
    const W* from = w.p + i * w.row + k0;
    Packed<W>* to = buffer + (i - begin) / rows * size + (i - begin) % rows * apart<Word<W>>(k);
    if constexpr (sizeof(W) == sizeof(Packed<W>)) std::memcpy(to, from, size_t(k) * sizeof(W));
    else for (int64_t c = 0; c < k; c += kLanes) store(to + c, load_part(from + c, k - c));
  }
}
#if defined(__AMX_BF16__)
// Rows of 32 elements along k, with zeros beyond the last one.
static void pack_amx_rows(const Weight<bf16>& w, int64_t begin, int64_t end, int64_t k0, int64_t k, bf16* buffer,
                          int64_t size) {
  const int64_t row = apart<Pair>(k);
  const auto at = [&](int64_t i) { return buffer + (i - begin) / kRows<Pair> * size + (i - begin) % kRows<Pair> * row; };
  if (w.row != 1) {  // k is odd
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(at(i), w.p + i * w.row + k0 * w.col, size_t(k) * sizeof(bf16));
      at(i)[k] = bf16{0};
    }
    return;
  }
  for (int64_t j = 0; j < k; j += 2 * kTileWords)
    for (int64_t i = begin; i < end; i += kLanes) {  // pairs of two rows of the weight, 16 by 16, transposed
      const int64_t count = smaller<int64_t>(kLanes, end - i);
      Vec pairs[kLanes];
#pragma GCC unroll 16
      for (int64_t n = 0; n < kLanes; ++n) {
        const bf16* from = w.p + i + (k0 + j + 2 * n) * w.col;
        const Vec even = j + 2 * n < k ? load_part(from, count) : Vec{};
        const Vec odd = j + 2 * n + 1 < k ? load_part(from + w.col, count) : Vec{};
        pairs[n] = of_bits(bits_of(even) >> 16 | bits_of(odd));
      }
      transpose(pairs);
      bf16* to = at(i) + j;
      for (int64_t n = 0; n < count; ++n) std::memcpy(to + n * row, &pairs[n], sizeof(Vec));
    }
}
#endif

template <class W>
static void pack_rows(const Weight<W>& w, int64_t begin, int64_t end, int64_t k0, int64_t k, Packed<W>* buffer,
                      int64_t size) {
  if constexpr (kAmx<Word<W>>) return pack_amx_rows(w, begin, end, k0, k, buffer, size);
  constexpr int step = kElements<Word<W>>, together = 8;  // tiles: few visits to a column, which is often a page away
  const int64_t whole = w.row == 1 ? larger<int64_t>(end - begin - round_up(kVectorRows, kLanes) + kVectorRows, 0) / kVectorRows : 0;
  for (int64_t first = 0; first < whole; first += together)
    for (int64_t j = 0; j < k; j += step) {
      const W* from = w.p + begin + first * kVectorRows + (k0 + j) * w.col;
      Packed<W>* to = buffer + first * size + j * kVectorRows;
      for (int64_t n = smaller<int64_t>(together, whole - first); n > 0; --n, from += kVectorRows, to += size)
        pack_words<true>(from, 1, j + 1 < k ? w.col : 0, kVectorRows, to);
    }
  for (int64_t i = begin + whole * kVectorRows; i < end; i += kVectorRows)
    for (int64_t j = 0; j < k; j += step)
      pack_words<false>(w.p + i * w.row + (k0 + j) * w.col, w.row, j + 1 < k ? w.col : 0, smaller<int64_t>(kVectorRows, end - i),
                        buffer + (i - begin) / kVectorRows * size + j * kVectorRows);
}

// Of right operands that stay in the L2 cache while weights pass by.
constexpr int64_t kPanelBytes = (kLargeL2 ? 1024 : 256) << 10;
constexpr int64_t kPackedBytes = (kLargeL2 ? 512 : 128) << 10;  // of packed weights that a thread holds at a time

// The columns of `k` that a product takes at a time, for all rows, so that the panels stay in the L2 cache and a packed
// tile in half of an L1 cache: parts of nearly one size, in whole segments. All of them with AMX, which loses more by sums
// that are stored and loaded again.
template <class W>
MACARON_INLINE int64_t columns_of(const Weight<W>& w, int64_t k) {
  using WordT = Word<W>;
  constexpr int64_t in_place = 4 * kSegment, packed = 24 * kElements<WordT> / kVectorRows * kSegment;
  const int64_t most = w.col == 1 ? in_place : packed;
  return kAmx<WordT> || k <= most ? k : round_up(ceil_div(k, ceil_div(k, most)), kSegment);
}

// body(i, rows, left, p, c) for tiles of kRows rows of `weights` (one, or two side by side: left[0], left[1]), each of
// `panels` panels of k features, and of these `columns` at a time from c on. Threads divide the rows; each of them packs
// its rows once.
template <int count, class W, class Body>
static void each_tile(const Host& host, const Weight<W> (&weights)[count], int64_t rows, int64_t k0, int64_t k,
                      int64_t columns, int64_t panels, const Body& body) {
  using WordT = Word<W>;
  constexpr int64_t tile = kRows<WordT>;
  columns = smaller(columns, k);
  const int64_t together = larger<int64_t>(kPanelBytes / (4 * kPanel * ceil_div(columns, kElements<WordT>) + 1), 1);
  const Source source = source_of(weights[0], k, panels);
  const bool lies = source == Source::in_place;
  const int64_t size = packed_size<WordT>(columns), packed_bytes = count * size * int64_t(sizeof(Packed<W>));
  int64_t most = ceil_div(rows, tile);
  if (source == Source::packed) most = larger<int64_t>(kPackedBytes / packed_bytes, 1);
  if (source == Source::copied) most = 1;  // right before they are read
  const int64_t at_a_time = source == Source::copied ? together : panels;
  parallel(host, ceil_div(rows, tile), [&](int64_t first_tile, int64_t last_tile) {
    const TileRegisters<WordT> registers;
    const int64_t held = smaller(most, last_tile - first_tile);
    const Buffer<Packed<W>> packed(host, lies ? 0 : held * count * size);
    auto tiles = [&](int64_t begin, int64_t end, int64_t first, int64_t last, int64_t c) {
      const int64_t n = smaller(columns, k - c);
      for (int w = 0; w < count && !lies; ++w)
        (source == Source::copied ? copy_rows<W> : pack_rows<W>)(weights[w], begin * tile, smaller(end * tile, rows),
                                                                 k0 + c, n, packed + w * size, count * size);
      for (int64_t p0 = first; p0 < last; p0 += together)
        for (int64_t b = begin; b < end; ++b) {
          Left<Packed<W>> left[count];
          for (int w = 0; w < count; ++w) {
            left[w] = left_of(weights[w], source, b * tile, k0 + c, n, packed + ((b - begin) * count + w) * size);
            left[w].ahead = lies ? tile * weights[w].row : 0;  // the first panel fetches the next rows
          }
          for (int64_t p = p0; p < smaller(p0 + together, last); ++p) {
            body(b * tile, smaller(tile, rows - b * tile), left, p, c);
            for (int w = 0; w < count; ++w) left[w].ahead = 0;
          }
        }
    };
    for (int64_t c = 0; c == 0 || c < k; c += columns)
      for (int64_t p = 0; p < panels; p += at_a_time)
        for (int64_t b = first_tile; b < last_tile; b += held)
          tiles(b, smaller(b + held, last_tile), p, smaller(p + at_a_time, panels), c);
  });
}

}  // namespace macaron_ops::MACARON_OPS_ISA
