// Normalisation of rows: y = (x - mean) * scale * weight + bias, with the row's statistics in float.
#pragma once

#include "operators.h"
#include "vec.h"

namespace macaron_ops::MACARON_OPS_ISA {

struct Statistics {
  float mean, scale;
  bool clamped;  // sphere: the row is shorter than eps, so that `scale` is constant there
  float length = 1.f;  // sphere: 1 / scale
};

template <class X>
static Statistics statistics(const X* x, int64_t width, const Norm& norm) {
  if (norm.kind == NormKind::none) return {0.f, 1.f, false};
  float mean = 0.f;
  if (norm.kind == NormKind::layer) {
    Vec total = {};
    for (int64_t c = 0; c < width; c += kLanes) total += load_part(x + c, width - c);
    mean = sum(total) / float(width);
  }
  Vec squares = {}, rests = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const Vec d = load(x + c) - mean;
    squares += d * d;
    rests += d;
  }
  float square = sum(squares), rest = sum(rests);
  for (; c < width; ++c) {
    const float d = to_float(x[c]) - mean;
    square += d * d;
    rest += d;
  }
  if (norm.kind == NormKind::sphere) {
    const float length = __builtin_sqrtf(square), divisor = larger(length, norm.eps);
    return {0.f, 1.f / divisor, length < norm.eps, divisor};
  }
  float variance = square / float(width);
  if (norm.kind == NormKind::layer) {  // what rounding took from the mean, which a row of equal numbers must hit exactly
    rest /= float(width);
    mean += rest;
    variance -= rest * rest;
    if (variance < 0.f) variance = 0.f;
  }
  return {mean, 1.f / __builtin_sqrtf(variance + norm.eps), false};
}

// The standardised row. On the sphere its length is 1 as closely as can be, or its gradient keeps a radial part.
MACARON_INLINE Vec standardised(Vec v, const Statistics& s, const Norm& norm) {
  return norm.kind == NormKind::sphere ? v / s.length : (v - s.mean) * s.scale;
}

// Columns c to c + kLanes of a normalised row; `v` holds those of x.
MACARON_INLINE Vec normalized(Vec v, const Statistics& s, const Norm& norm, int64_t c, int64_t width) {
  if (norm.kind == NormKind::none) return v;
  v = standardised(v, s, norm);
  if (norm.weight != nullptr) v *= load_part(norm.weight + c, width - c);
  if (norm.bias != nullptr) v += load_part(norm.bias + c, width - c);
  return v;
}

// The gradient in x from that in N(x), `grad`, of one row. `grad` and `grad_x` may be the same row.
template <class X>
static void norm_backward_row(const X* x, const float* grad, int64_t width, const Norm& norm, const Statistics& s,
                              float* grad_x) {
  const bool sphere = norm.kind == NormKind::sphere;
  const auto standard = [&](int64_t c) { return standardised(load_part(x + c, width - c), s, norm); };
  Vec along = {}, total = {};  // sums of g y and of g, with y the standardised row and g = grad * weight
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t n = width - c;
    Vec g = load_part(grad + c, n);
    if (norm.weight != nullptr) g *= load_part(norm.weight + c, n);
    along += g * standard(c);  // beyond the last column g is 0
    total += g;
    store_part(grad_x + c, g, n);  // rounded: where y takes all of g away, nothing of it may be left
  }
  const float g_y = s.clamped ? 0.f : sphere ? sum(along) : sum(along) / float(width);
  const float g_1 = norm.kind == NormKind::layer ? sum(total) / float(width) : 0.f;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t n = width - c;
    store_part(grad_x + c, s.scale * (load_part(grad_x + c, n) - standard(c) * g_y - g_1), n);
  }
}

// The gradients in x of `count` rows, which may lie where `grad` does; those in weight and bias are added to theirs,
// where they are not null, pairwise over kLanes rows: the errors of one chain of sums grow with its length.
template <class X>
static void norm_backward(const X* x, const float* grad, int64_t count, int64_t width, const Norm& norm, float* grad_x,
                          float* grad_weight, float* grad_bias) {
  if (norm.kind == NormKind::none) {
    if (grad_x != grad) std::memcpy(grad_x, grad, size_t(count * width) * sizeof(float));
    return;
  }
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t rows = smaller<int64_t>(kLanes, count - first), at = first * width;
    Statistics stats[kLanes];
    for (int64_t i = 0; i < rows; ++i) stats[i] = statistics(x + at + i * width, width, norm);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t n = width - c;
      Vec g[kLanes], along[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        g[i] = i < rows ? load_part(grad + at + i * width + c, n) : Vec{};
        along[i] = i < rows ? g[i] * standardised(load_part(x + at + i * width + c, n), stats[i], norm) : Vec{};
      }
      if (grad_weight != nullptr)
        store_part(grad_weight + c, load_part(grad_weight + c, n) + sum_of<kLanes>(along), n);
      if (grad_bias != nullptr) store_part(grad_bias + c, load_part(grad_bias + c, n) + sum_of<kLanes>(g), n);
    }
    for (int64_t i = 0; i < rows; ++i)
      norm_backward_row(x + at + i * width, grad + at + i * width, width, norm, stats[i], grad_x + at + i * width);
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
