// Gradients of parameter matrices: grad_w[f][d] = sum over tokens of a[f][token] b[token][d].
//
// a comes in panels of elements [panel][f][kPanel] (tokens side by side), b in columns (panel.h). Threads divide the
// features f, so that the sum over tokens has one order whatever their number. Of a transposed gradient grad_w[d][f] tiles
// are transposed before they are written; with AMX, which computes faster than that, a is, and b comes in elements.
#pragma once

#include "host.h"
#include "panel.h"
#include "weight.h"

namespace macaron_ops::MACARON_OPS_ISA {

// sums[f] (+)= the sum over tokens of a[f][token], for f from `begin` to `end`.
template <class Element>
static void add_rows(const Element* a, int64_t features, int64_t begin, int64_t end, int64_t panels, float* sums,
                     bool accumulate) {
  for (int64_t f = begin; f < end; ++f) {
    Vec total = {};
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t l = 0; l < kPanel; l += kLanes) total += load(a + (p * features + f) * kPanel + l);
    sums[f] = (accumulate ? sums[f] : 0.f) + sum(total);
  }
}

// The upper or lower halves of floats' bits, as they are.
MACARON_INLINE void store_halves(bf16* p, VecU bits, int64_t count) {
  const VecH halves = __builtin_convertvector(bits, VecH);
  std::memcpy(p, &halves, size_t(smaller<int64_t>(count, kLanes)) * sizeof(bf16));
}

// Where the gradient of a matrix goes, group of tokens after group. In bf16 the sum of several groups stays a float: its
// upper half in the gradient, its lower half in a buffer beside it, until the last group rounds it.
template <class W>
class MatrixGradient {
 public:
  // grad: (features, width), transposed (width, features); null where it is not needed.
  MatrixGradient(const Host& host, W* grad, int64_t features, int64_t width, bool transposed, bool several_groups)
      : grad_(grad),
        features_(features),
        width_(width),
        transposed_(transposed),
        lower_(host, grad != nullptr && several_groups && kNarrow ? features * width : 0) {}

  explicit operator bool() const { return grad_ != nullptr; }

  // Bytes that several groups need besides the gradient.
  static int64_t bytes_beside(int64_t features, int64_t width) {
    return kNarrow ? features * width * int64_t(sizeof(W)) : 0;
  }

  // Adds what a group of `tokens` contributes, and to `bias` where it is not null the sums over a's rows; `last` writes the
  // gradient.
  template <class WordT>
  void add(const Host& host, const typename Arithmetic<WordT>::Element* a, int64_t tokens, const WordT* columns,
           bool first, bool last, float* bias) {
    constexpr int step = kElements<WordT>;
    constexpr int64_t tile = kRows<WordT>;
    const int64_t panels = ceil_div(tokens, kPanel), block_size = panels * kPanel / step * kPanel;  // words of a block
    const int64_t words = panels == 1 ? ceil_div(tokens, step) : kPanel / step;  // a single short panel is not summed in full
    const int64_t near = larger<int64_t>(kPanelBytes / (4 * block_size), 1) * kPanel;  // columns that stay in the L2 cache
    if constexpr (kAmx<WordT>)
      if (transposed_) return add_turned(host, a, panels, words, reinterpret_cast<const bf16*>(columns), first, last);
    parallel(host, ceil_div(features_, tile), [&](int64_t first_tile, int64_t last_tile) {
      const TileRegisters<WordT> registers;
      const int64_t begin = first_tile * tile, end = smaller(last_tile * tile, features_);
      if (bias != nullptr) add_rows(a, features_, begin, end, panels, bias, !first);
      alignas(64) float part[kTransposed * kPanel];
      auto tiles = [&](int64_t f, int64_t stop, int64_t d, bool ahead) {
        const int64_t valid = smaller<int64_t>(kPanel, width_ - d);
        for (int64_t i = f; i < stop; i += tile) {
          const Left<typename Arithmetic<WordT>::Element> left{a + i * kPanel, kPanel, step, words, panels,
                                                               features_ * kPanel, ahead ? tile * kPanel : 0};
          tile_rows(smaller(tile, stop - i), left, columns + d / kPanel * block_size, kPanel, valid,
                    part + (i - f) * kPanel, kPanel, false, chain_for(width_, features_));
        }
        write(part, f, stop - f, d, valid, first, last);
      };
      // The loops follow the rows of the gradient, so that its cache lines are written whole.
      if (transposed_)
        for (int64_t d = 0; d < width_; d += kPanel)
          for (int64_t f = begin; f < end; f += kTransposed) tiles(f, smaller(f + kTransposed, end), d, true);
      else
        for (int64_t d0 = 0; d0 < width_; d0 += near)
          for (int64_t f = begin; f < end; f += tile)
            for (int64_t d = d0; d < smaller(d0 + near, width_); d += kPanel) tiles(f, smaller(f + tile, end), d, d == d0);
    });
  }

 private:
  // For AMX: grad[d][f] from b's elements [panel][d][kPanel], and a's words as columns.
  template <class Element>
  void add_turned(const Host& host, const Element* a, int64_t panels, int64_t words, const Element* b, bool first, bool last) {
    constexpr int64_t tile = kRows<Pair>;
    const int64_t all_words = panels * kPanel / 2;
    parallel(host, ceil_div(features_, kPanel), [&](int64_t begin, int64_t end) {
      const TileRegisters<Pair> registers;
      const Buffer<Pair> columns(host, all_words * kPanel);
      alignas(64) float part[tile * kPanel];
      for (int64_t f = begin * kPanel; f < smaller(end * kPanel, features_); f += kPanel) {
        const int64_t valid = smaller<int64_t>(kPanel, features_ - f);
        for (int64_t p = 0; p < panels; ++p)
          elements_to_columns(a + (p * features_ + f) * kPanel, valid, columns + p * kPanel / 2 * kPanel);
        for (int64_t d = 0; d < width_; d += tile) {
          const int64_t rows = smaller(tile, width_ - d);
          const Left<Element> left{b + d * kPanel, kPanel, 2, words, panels, width_ * kPanel};
          tile_rows(rows, left, static_cast<const Pair*>(columns), kPanel, valid, part, kPanel, false);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < valid; j += kLanes)
              put((d + i) * features_ + f + j, load(part + i * kPanel + j), valid - j, first, last);
        }
      }
    });
  }
  // [features][kPanel] elements, at most kPanel features, to [kPanel / 2][kPanel] pairs of tokens.
  static void elements_to_columns(const bf16* elements, int64_t features, Pair* columns) {
    const float* rows = reinterpret_cast<const float*>(elements);  // of words
    for (int64_t f = 0; f < kPanel; f += kLanes)
      for (int64_t w = 0; w < kPanel / 2; w += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = f + i < features ? load(rows + (f + i) * (kPanel / 2) + w) : Vec{};
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(columns + (w + i) * kPanel + f), r[i]);
      }
  }

  static constexpr int64_t kTransposed = 4 * kRows<Word<W>>;  // rows that become columns at a time: whole vectors
  static_assert(kTransposed % kLanes == 0);
  static constexpr bool kNarrow = sizeof(W) < sizeof(float);

  void write(const float* tile, int64_t f, int64_t rows, int64_t d, int64_t valid, bool first, bool last) {
    if (!transposed_) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < valid; j += kLanes)
          put((f + i) * width_ + d + j, load(tile + i * kPanel + j), valid - j, first, last);
      return;
    }
    for (int64_t i = 0; i < rows; i += kLanes)
      for (int64_t j = 0; j < valid; j += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) r[k] = i + k < rows ? load(tile + (i + k) * kPanel + j) : Vec{};
        transpose(r);
        for (int k = 0; k < smaller<int64_t>(kLanes, valid - j); ++k)
          put((d + j + k) * features_ + f + i, r[k], rows - i, first, last);
      }
  }

  // The first `count` lanes of v to the elements from `at` on.
  void put(int64_t at, Vec v, int64_t count, bool first, bool last) {
    W* to = grad_ + at;
    if constexpr (kNarrow) {
      if (lower_ != nullptr) {
        if (!first) v += of_bits(bits_of(load_part(to, count)) | bits_of(load_part(lower_ + at, count)) >> 16);
        if (last) return store_part(to, v, count);
        store_halves(to, bits_of(v) >> 16, count);
        return store_halves(lower_ + at, bits_of(v) & 0xffffu, count);
      }
    }
    store_part(to, first ? v : load_part(to, count) + v, count);
  }

  W* grad_;
  int64_t features_, width_;
  bool transposed_;
  Buffer<W> lower_;
};

// The same with threads that divide the features.
template <class Element>
static void add_rows(const Host& host, const Element* a, int64_t features, int64_t panels, float* sums, bool accumulate) {
  parallel(host, features,
           [&](int64_t begin, int64_t end) { add_rows(a, features, begin, end, panels, sums, accumulate); });
}

// Rows of partial sums, one per panel, added up: sums[c] (+)= sum over p of partial[p][c]. In four chains, because the
// rounding errors of a sum grow with its length.
static inline void add_partial(const float* partial, int64_t panels, int64_t stride, int64_t width, float* sums,
                               bool accumulate) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec chains[4] = {};
    for (int64_t p = 0; p < panels; ++p) chains[p % 4] += load_part(partial + p * stride + c, width - c);
    const Vec before = accumulate ? load_part(sums + c, width - c) : Vec{};
    store_part(sums + c, before + sum_of<4>(chains), width - c);
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
