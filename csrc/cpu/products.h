// Products of a parameter matrix with panels of tokens; threads divide the rows of the matrix.
#pragma once

#include "blocks.h"
#include "heads.h"
#include "weight.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Tokens 0 ... rows in panels, some of a call's.
struct Tokens {
  int64_t rows;
  int64_t all;  // of the call's

  int64_t panels() const { return ceil_div(rows, kPanel); }
  int64_t count(int64_t p) const { return tokens_of(p, rows); }
};

// sums[p] (+)= w b[p], with sums (rows, kPanel) floats and b `stride` words per panel.
template <class W>
static void product(const Host& host, const Tokens& tokens, const Weight<W>& w, int64_t rows, int64_t k,
                    const Word<W>* b, int64_t stride, float* sums, bool accumulate) {
  const Weight<W> weights[1] = {w};
  each_tile(host, weights, rows, 0, k, columns_of(w, k), tokens.panels(),
            [&](int64_t row, int64_t count, const Left<Packed<W>>* left, int64_t p, int64_t c) {
              tile_rows(count, left[0], b + p * stride + c / kElements<Word<W>> * kPanel, kPanel, tokens.count(p),
                        sums + (p * rows + row) * kPanel, kPanel, accumulate || c > 0, chain_for(tokens.all, rows));
            });
}

// Rows of a product that are the channels of heads.
template <class W>
struct ToHeads {
  Weight<W> w;
  int64_t rows;
  const float* bias;
  AllHeads<Word<W>> heads;
};

// Several of them with the same k columns: one product where their weights lie one after the other.
template <class W>
static void project(const Host& host, const Tokens& tokens, const ToHeads<W>* parts, int num_parts, int64_t k,
                    const Word<W>* b, int64_t stride) {
  const int64_t panels = tokens.panels();
  int64_t fewest = parts[0].rows;  // what follows is the same whether weights lie one after the other or not
  for (int i = 1; i < num_parts; ++i) fewest = smaller(fewest, parts[i].rows);
  const Buffer<Segment> segments(host, panels * kPanel);
  const Buffer<int> num_segments(host, panels);
  for (int64_t p = 0; p < panels; ++p)
    num_segments[p] = segments_of(p * kPanel, tokens.count(p), parts[0].heads.at, segments + p * kPanel);
  for (int first = 0, last; first < num_parts; first = last) {
    int64_t rows = parts[first].rows;
    for (last = first + 1; last < num_parts && parts[last].w.p == parts[first].w.p + rows * parts[first].w.row; ++last)
      rows += parts[last].rows;
    const Weight<W> weights[1] = {parts[first].w};
    each_tile(host, weights, rows, 0, k, k, panels, [&](int64_t row, int64_t count, const Left<Packed<W>>* left, int64_t p,
                                                        int64_t) {
      alignas(64) float tile[kRows<Word<W>> * kPanel + kLanes];
      tile_rows(count, left[0], b + p * stride, kPanel, tokens.count(p), tile, kPanel, false,
                chain_for(tokens.all, fewest));
      int64_t begin = 0;  // the first row of a part
      for (int i = first; i < last; begin += parts[i].rows, ++i) {
        const int64_t from = larger(row, begin), to = smaller(row + count, begin + parts[i].rows);
        if (from < to)
          scatter(tile + (from - row) * kPanel, parts[i].bias, to - from, from - begin, segments + p * kPanel,
                  num_segments[p], parts[i].heads);
      }
    });
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
