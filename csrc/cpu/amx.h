// Products of pairs of bf16 in the tile registers of AMX: C[i][lane] (+)= sum_k A[i][k] B[k][lane].
//
// A tile register holds 16 rows of 64 bytes. tdpbf16ps multiplies one of left operands, [16 rows][32 elements along k], with
// one of right operands, [16 words along k][16 lanes]: rows of a weight as nn.Linear keeps them, and part of a panel. Both
// are loaded as they lie. Of the eight registers four are sums, [32 rows][32 lanes], and two hold either operand: for
// every load of a kilobyte one product of 16 cycles.
//
// One product adds the sum of its 32 terms to a sum in one rounding: chains are short, and there are no segments. A sum that
// is interrupted at a multiple of 32 terms, stored and loaded again, has the same bits as one that is not.
#pragma once

#include "operand.h"

namespace macaron_ops::MACARON_OPS_ISA {

// The tile registers of this thread while the object lives: every task that multiplies holds one, and no two at a time.
// Registers that hold something cost every switch of threads 8 KiB.
template <class WordT>
struct TileRegisters {
  TileRegisters() {}  // not trivial: nobody warns of an unused one
};

#if defined(__AMX_BF16__)
constexpr int64_t kTileRows = 16, kTileWords = 16, kTileBytes = 64;

template <>
struct TileRegisters<Pair> {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = kTileBytes, shape.rows[i] = kTileRows;
    asm volatile("" : : "m"(shape));
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The compiler does not know that loads of tiles read memory.
MACARON_INLINE void memory_is_written() { asm volatile("" : : : "memory"); }

// A part of an operand with zeros around it, as a whole tile.
struct alignas(64) PaddedTile {
  uint32_t words[kTileRows][kTileWords];

  const PaddedTile& of(const void* p, int64_t stride, int64_t rows, int64_t count) {  // stride in bytes
    const __mmask16 some = __mmask16((1u << count) - 1u);
    for (int64_t i = 0; i < kTileRows; ++i)
      _mm512_store_si512(words[i], i < rows ? _mm512_maskz_loadu_epi32(some, static_cast<const char*>(p) + i * stride)
                                            : _mm512_setzero_si512());
    memory_is_written();
    return *this;
  }
};

// Rows 0 ... 16, and where they are wanted 16 more from row `below` on: the last two sixteens may share rows.
template <bool two_rows, bool two_lanes>
static void amx_tiles(const Left<bf16>& a, int64_t below, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                      bool accumulate) {
  const int64_t a_stride = a.row * 2, b_stride = ldb * 4, c_stride = ldc * 4;
  float* const c_below = c + below * ldc;
  memory_is_written();
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (two_lanes) _tile_loadd(1, c + kTileWords, c_stride);
    if constexpr (two_rows) _tile_loadd(2, c_below, c_stride);
    if constexpr (two_rows && two_lanes) _tile_loadd(3, c_below + kTileWords, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (two_lanes) _tile_zero(1);
    if constexpr (two_rows) _tile_zero(2);
    if constexpr (two_rows && two_lanes) _tile_zero(3);
  }
  const auto multiply = [](const void* left, const void* left_below, int64_t left_stride, const void* right,
                           const void* right_beside, int64_t right_stride) {
    _tile_loadd(6, right, right_stride);
    _tile_loadd(4, left, left_stride);
    if constexpr (two_lanes) _tile_loadd(7, right_beside, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_rows) _tile_loadd(5, left_below, left_stride);
    if constexpr (two_lanes) _tile_dpbf16ps(1, 4, 7);
    if constexpr (two_rows) _tile_dpbf16ps(2, 5, 6);
    if constexpr (two_rows && two_lanes) _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t run = 0; run < a.runs; ++run) {
    const bf16* at = a.p + run * a.jump;
    int64_t words = a.words;
    for (; words >= kTileWords; words -= kTileWords) {
      multiply(at, at + below * a.row, a_stride, b, b + kTileWords, b_stride);
      at += 2 * kTileWords;
      b += kTileWords * ldb;
    }
    if (words == 0) continue;
    PaddedTile left, left_below, right, beside;
    left.of(at, a_stride, kTileRows, words);
    right.of(b, b_stride, words, kTileWords);
    if constexpr (two_rows) left_below.of(at + below * a.row, a_stride, kTileRows, words);
    if constexpr (two_lanes) beside.of(b + kTileWords, b_stride, words, kTileWords);
    multiply(&left, &left_below, kTileBytes, &right, &beside, kTileBytes);
    b += words * ldb;
  }
  _tile_stored(0, c, c_stride);
  if constexpr (two_lanes) _tile_stored(1, c + kTileWords, c_stride);
  if constexpr (two_rows) _tile_stored(2, c_below, c_stride);
  if constexpr (two_rows && two_lanes) _tile_stored(3, c_below + kTileWords, c_stride);
}

// Fewer than 16 rows: as many as a tile has, of which the last are zeros.
static void amx_few_rows(int64_t rows, const Left<bf16>& a, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                         bool accumulate) {
  PaddedTile left, sums;
  if (accumulate) sums.of(c, ldc * 4, rows, kTileWords);
  for (int64_t run = 0; run < a.runs; ++run)
    for (int64_t word = 0; word < a.words; word += kTileWords) {
      const int64_t words = smaller(kTileWords, a.words - word);
      left.of(a.p + run * a.jump + 2 * word, a.row * 2, rows, words);
      amx_tiles<false, false>({reinterpret_cast<const bf16*>(&left), 2 * kTileWords, 2, words}, 0,
                              b + (run * a.words + word) * ldb, ldb, reinterpret_cast<float*>(&sums), kTileWords,
                              accumulate || run > 0 || word > 0);
    }
  for (int64_t i = 0; i < rows; ++i) store(c + i * ldc, load(reinterpret_cast<const float*>(sums.words[i])));
}

// At most 32 rows, whose words are neighbours, and 32 lanes, rounded up to vectors.
MACARON_INLINE void amx_rows(int64_t rows, const Left<bf16>& a, const Pair* b, int64_t ldb, int64_t lanes, float* c,
                     int64_t ldc, bool accumulate) {
  const bool two_lanes = lanes > kTileWords;
  if (rows < kTileRows) {
    for (int64_t lane = 0; lane < lanes; lane += kTileWords)
      amx_few_rows(rows, a, b + lane, ldb, c + lane, ldc, accumulate);
    return;
  }
  const auto tiles = rows > kTileRows ? (two_lanes ? amx_tiles<true, true> : amx_tiles<true, false>)
                                      : (two_lanes ? amx_tiles<false, true> : amx_tiles<false, false>);
  tiles(a, rows - kTileRows, b, ldb, c, ldc, accumulate);
}
#endif

}  // namespace macaron_ops::MACARON_OPS_ISA
