// The products of sm90/product.h on the CPU, for tests of what is around CUTLASS's: plain sums where the GPU has wgmma,
// then what its epilogues compute, by their own code, with their roundings. Not seen: TMA, barriers, layouts of fragments.
//
// As there a tile reaches past the edges of out: what is summed of a tile's rows is zero beyond them, and NaN where
// nobody may read.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../sm90/elements.h"
#include "../sm90/product.h"

namespace macaron_ops::cuda::sm90 {
namespace {

constexpr int kElements = 8;  // of a fragment; columns are a multiple
struct Fragment {
  static constexpr int kElements = sm90::kElements;
  float number[kElements];
  float& operator[](int i) { return number[i]; }
  float operator[](int i) const { return number[i]; }
};

template <class T>
Fragment fragment(const void* from, int64_t at) {  // zeros where there is none
  Fragment f{};
  for (int i = 0; from != nullptr && i < kElements; ++i) f[i] = to_float(static_cast<const T*>(from)[at + i]);
  return f;
}
template <class T>
void store(void* to, int64_t at, const Fragment& f) {
  for (int i = 0; to != nullptr && i < kElements; ++i) static_cast<T*>(to)[at + i] = rounded<T>(f[i]);
}

// The right operand in float32, (depth, columns).
template <class T>
std::vector<float> along_columns(const Product& p, bool right_along_depth) {
  std::vector<float> right(size_t(p.depth) * size_t(p.columns));
  for (int64_t k = 0; k < p.depth; ++k)
    for (int64_t j = 0; j < p.columns; ++j)
      right[size_t(k * p.columns + j)] =
          to_float(static_cast<const T*>(p.right)[right_along_depth ? j * p.depth + k : k * p.columns + j]);
  return right;
}

// finish(sums, row, column) for each fragment of L R.
template <class T, class Finish>
void multiply(const Product& p, bool right_along_depth, const Finish& finish) {
  if (p.columns % kElements != 0 || p.depth % kElements != 0) throw std::runtime_error("rows are not aligned to 16 bytes");
  const std::vector<float> right = along_columns<T>(p, right_along_depth);
  std::vector<float> sums(size_t(p.columns));
  for (int64_t row = 0; row < p.rows; ++row) {
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t k = 0; k < p.depth; ++k) {
      const float left = to_float(static_cast<const T*>(p.left)[row * p.depth + k]);
      const float* line = right.data() + k * p.columns;
      for (int j = 0; j < p.columns; ++j) sums[size_t(j)] += left * line[j];
    }
    for (int j = 0; j < p.columns; j += kElements) finish(fragment<float>(sums.data(), j), row, j);
  }
}

template <class T>
void hidden(const Product& p) {
  multiply<T>(p, true, [&](const Fragment& sums, int64_t row, int column) {
    const Fragment bias = fragment<T>(p.bias, column);
    Fragment z;
    for (int i = 0; i < kElements; ++i) z[i] = sums[i] + bias[i];
    store<T>(p.kept, row * p.columns + column, z);
    store<T>(p.out, row * p.columns + column, Activate<Fragment>{}(z, {p.activation}));
  });
}

template <class T>
void residual(const Product& p) {
  multiply<T>(p, true, [&](const Fragment& sums, int64_t row, int column) {
    const int64_t at = row * p.columns + column;
    store<T>(p.out, at, Residual<Fragment>{}(sums, fragment<T>(p.bias, column), fragment<T>(p.source, at), {p.a, p.c}));
  });
}

template <class T>
void backward(const Product& p) {
  const Tile tile = kTiles[p.variant];
  const int64_t across = int64_t(ceil_div(p.columns, tile.columns)) * tile.columns;
  if (p.sums != nullptr) {
    std::fill_n(p.sums, ceil_div(p.rows, tile.rows) * across, std::numeric_limits<float>::quiet_NaN());
    for (int64_t t = 0; t < ceil_div(p.rows, tile.rows); ++t) std::fill_n(p.sums + t * across, p.columns, 0.f);
  }
  multiply<T>(p, false, [&](const Fragment& sums, int64_t row, int column) {
    const int64_t at = row * p.columns + column;
    Fragment h, dz;
    differentiate<kElements>(p.activation, p.c, sums, fragment<T>(p.source, at), h, dz);
    store<T>(p.kept, at, h);
    store<T>(p.out, at, dz);
    for (int i = 0; p.sums != nullptr && i < kElements; ++i) p.sums[row / tile.rows * across + column + i] += dz[i];
  });
}

}  // namespace

void hidden_bf16(const Product& p, void*) { hidden<bf16>(p); }
void hidden_fp16(const Product& p, void*) { hidden<half>(p); }
void residual_bf16(const Product& p, void*) { residual<bf16>(p); }
void residual_fp16(const Product& p, void*) { residual<half>(p); }
void backward_bf16(const Product& p, void*) { backward<bf16>(p); }
void backward_fp16(const Product& p, void*) { backward<half>(p); }

}  // namespace macaron_ops::cuda::sm90
