// Gradients of parameter matrices: grad_w[f][d] = sum over tokens of a[f][token] b[token][d].
//
// a comes in panels of elements [panel][f][kPanel] (tokens side by side), b in columns (panel.h). Threads divide the
// features f, so that the sum over tokens has one order whatever their number.
#pragma once

#include "host.h"
#include "panel.h"
#include "weight.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Where the gradient of a matrix goes, group of tokens after group. Only several groups of one that would be rounded each
// time (bf16) need `sums`.
template <class W>
class MatrixGradient {
 public:
  // grad: (features, width), transposed (width, features); null where it is not needed.
  MatrixGradient(const Host& host, W* grad, int64_t features, int64_t width, bool transposed, bool several_groups)
      : grad_(grad),
        features_(features),
        width_(width),
        transposed_(transposed),
        sums_(host, grad != nullptr && several_groups ? sums_size(features, width) : 0) {}

  explicit operator bool() const { return grad_ != nullptr; }

  // Floats that several groups need besides the gradient.
  static int64_t sums_size(int64_t features, int64_t width) { return kInPlace ? 0 : features * round_up(width, kPanel); }

  // Adds what a group of `tokens` contributes; `last` writes the gradient.
  template <class WordT>
  void add(const Host& host, const typename Arithmetic<WordT>::Element* a, int64_t tokens, const WordT* columns,
           bool first, bool last) {
    constexpr int step = kElements<WordT>;
    const int64_t panels = ceil_div(tokens, kPanel), block_size = panels * kPanel / step * kPanel;  // words of a block
    const int64_t words = panels == 1 ? ceil_div(tokens, step) : kPanel / step;  // a single short panel is not summed in full
    const int64_t row_size = round_up(width_, kPanel);
    parallel(host, ceil_div(features_, kRows), [&](int64_t begin, int64_t end) {
      const int64_t last_feature = smaller(end * kRows, features_);
      alignas(64) float part[kRows * kPanel];
      auto tile = [&](int64_t f, int64_t d) {
        const int64_t rows = smaller<int64_t>(kRows, last_feature - f), valid = smaller<int64_t>(kPanel, width_ - d);
        const Left<typename Arithmetic<WordT>::Element> left{a + f * kPanel, kPanel, step, words, panels,
                                                             features_ * kPanel};
        float* at = sums_ != nullptr ? sums_ + f * row_size + d : part;
        const int64_t stride = sums_ != nullptr ? row_size : kPanel;
        tile_rows(rows, left, columns + d / kPanel * block_size, kPanel, valid, at, stride, sums_ != nullptr && !first);
        if (sums_ == nullptr || last) write(at, stride, f, rows, d, valid, sums_ == nullptr && !first);
      };
      // The loops follow the rows of the gradient, so that its cache lines are written whole.
      if (transposed_)
        for (int64_t d = 0; d < width_; d += kPanel)
          for (int64_t f = begin * kRows; f < last_feature; f += kRows) tile(f, d);
      else
        for (int64_t f = begin * kRows; f < last_feature; f += kRows)
          for (int64_t d = 0; d < width_; d += kPanel) tile(f, d);
    });
  }

 private:
  static constexpr bool kInPlace = sizeof(W) == sizeof(float);

  void write(const float* tile, int64_t stride, int64_t f, int64_t rows, int64_t d, int64_t valid, bool accumulate) {
    if (!transposed_) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < valid; j += kLanes) {
          W* to = grad_ + (f + i) * width_ + d + j;
          const Vec v = load(tile + i * stride + j);
          store_part(to, accumulate ? load_part(to, valid - j) + v : v, valid - j);
        }
      return;
    }
    for (int64_t i = 0; i < rows; i += kLanes)
      for (int64_t j = 0; j < valid; j += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) r[k] = i + k < rows ? load(tile + (i + k) * stride + j) : Vec{};
        transpose(r);
        for (int k = 0; k < smaller<int64_t>(kLanes, valid - j); ++k) {
          W* to = grad_ + (d + j + k) * features_ + f + i;
          store_part(to, accumulate ? load_part(to, rows - i) + r[k] : r[k], rows - i);
        }
      }
  }

  W* grad_;
  int64_t features_, width_;
  bool transposed_;
  Buffer<float> sums_;
};

// sums[f] (+)= the sum over tokens of a[f][token].
template <class Element>
static void add_rows(const Host& host, const Element* a, int64_t features, int64_t panels, float* sums, bool accumulate) {
  parallel(host, features, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      Vec total = {};
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t l = 0; l < kPanel; l += kLanes) total += load(a + (p * features + f) * kPanel + l);
      sums[f] = (accumulate ? sums[f] : 0.f) + sum(total);
    }
  });
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
