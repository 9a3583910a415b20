// Products of a parameter matrix with panels of tokens; threads divide the rows of the matrix.
#pragma once

#include "blocks.h"
#include "heads.h"
#include "weight.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Tokens 0 ... rows in panels.
struct Tokens {
  int64_t rows;

  int64_t panels() const { return ceil_div(rows, kPanel); }
  int64_t count(int64_t p) const { return tokens_of(p, rows); }
};

// Strips of kRows rows of w times b: take(row, rows, panel, left, lanes of b) for each strip and panel, where b has
// `stride` words per panel. A strip that lies in place is read for a few panels, which stay in the cache, at a time; one
// that has to be packed for all of them.
template <class W, class Take>
static void for_strips(const Weight<W>& w, int64_t first, int64_t last, int64_t rows, int64_t k, int64_t panels,
                       Packed<W>* packed, const Take& take) {
  constexpr int64_t kTogether = 4;
  const int64_t together = w.col == 1 && sizeof(W) == sizeof(Packed<W>) ? kTogether : larger<int64_t>(panels, 1);
  for (int64_t p0 = 0; p0 < panels; p0 += together)
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t row = strip * kRows, count = smaller<int64_t>(kRows, rows - row);
      const Left<Packed<W>> left = left_of(w, row, count, 0, k, packed);
      for (int64_t p = p0; p < smaller(p0 + together, panels); ++p) take(row, count, p, left);
    }
}

// sums[p] (+)= w b[p], with sums (rows, kPanel) floats and b `stride` words per panel.
template <class W>
static void product(const Host& host, const Tokens& tokens, const Weight<W>& w, int64_t rows, int64_t k,
                    const Word<W>* b, int64_t stride, float* sums, bool accumulate) {
  parallel(host, ceil_div(rows, kRows), [&](int64_t begin, int64_t end) {
    const Buffer<Packed<W>> packed(host, packed_size(k));
    for_strips(w, begin, end, rows, k, tokens.panels(), static_cast<Packed<W>*>(packed),
               [&](int64_t row, int64_t count, int64_t p, const Left<Packed<W>>& left) {
                 tile_rows(count, left, b + p * stride, kPanel, tokens.count(p), sums + (p * rows + row) * kPanel, kPanel,
                           accumulate);
               });
  });
}

// A product whose rows are the channels of heads.
template <class W>
struct ToHeads {
  Weight<W> w;
  int64_t rows;
  const float* bias;
  AllHeads<Word<W>> heads;

  int64_t strips() const { return ceil_div(rows, kRows); }
};

// Several of them with the same k columns.
template <class W>
static void project(const Host& host, const Tokens& tokens, const ToHeads<W>* parts, int num_parts, int64_t k,
                    const Word<W>* b, int64_t stride) {
  const int64_t panels = tokens.panels();
  const Buffer<Segment> segments(host, panels * kPanel);
  const Buffer<int> num_segments(host, panels);
  int64_t strips = 0;
  for (int64_t p = 0; p < panels; ++p)
    num_segments[p] = segments_of(p * kPanel, tokens.count(p), parts[0].heads.at, segments + p * kPanel);
  for (int i = 0; i < num_parts; ++i) strips += parts[i].strips();
  parallel(host, strips, [&](int64_t begin, int64_t end) {
    const Buffer<Packed<W>> packed(host, packed_size(k));
    alignas(64) float tile[kRows * kPanel + kLanes];
    for (int i = 0; i < num_parts; begin -= parts[i].strips(), end -= parts[i].strips(), ++i) {
      const ToHeads<W>& to = parts[i];
      for_strips(to.w, larger<int64_t>(begin, 0), smaller(end, to.strips()), to.rows, k, panels,
                 static_cast<Packed<W>*>(packed),
                 [&](int64_t row, int64_t count, int64_t p, const Left<Packed<W>>& left) {
                   tile_rows(count, left, b + p * stride, kPanel, tokens.count(p), tile, kPanel, false);
                   scatter(tile, to.bias, count, row, segments + p * kPanel, num_segments[p], to.heads);
                 });
    }
  });
}

}  // namespace macaron_ops::MACARON_OPS_ISA
