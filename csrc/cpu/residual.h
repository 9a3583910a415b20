// The residual that ends ffn_step and attend_step, y = scale x + step drop(u), normalised there if placement is post.
#pragma once

#include "dropout.h"
#include "panel.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Rows of y from the panel of u without its bias. `row` is the panel's first row in the tensor, x, y and total start
// there; `total` is null or gets the sum before its normalisation; `scratch` holds (count, width), for post alone.
template <class X, class T>
static void residual_forward(const float* u, const float* bias, int64_t row, int64_t count, int64_t width,
                             const Residual& residual, const Norm& norm, const X* x, X* y, T* total, float* scratch) {
  const Drop drop(residual.dropout);
  const bool post = !residual.pre;
  panel_to_rows(u, count, width, [&](int64_t i, int64_t c, Vec v, int64_t n) {
    if (bias != nullptr) v += load_part(bias + c, n);
    v = drop(v, (row + i) * width + c);
    v = residual.scale * load_part(x + i * width + c, n) + residual.step * v;
    if (!post) store_part(y + i * width + c, v, n);
    else store_part(scratch + i * width + c, v, n);
    if (post && total != nullptr) store_part(total + i * width + c, v, n);
  });
  if (!post || y == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    const float* sums = scratch + i * width;
    const Statistics s = statistics(sums, width, norm);
    for (int64_t c = 0; c < width; c += kLanes)
      store_part(y + i * width + c, normalized(load_part(sums + c, width - c), s, norm, c, width), width - c);
  }
}

// Sums over the rows of a panel that become gradients of (width,) parameters.
struct RowSums {
  float *bias, *norm_weight, *norm_bias;  // null where not needed
};

// The gradients of the residual's two terms: that of the sum, which is `grad` itself in pre placement and goes to
// `grad_total` (count, width) in post; and that of u, as panel and as what MatrixGradient wants for a transposed gradient:
// columns, elements with AMX (`token`: their first row there, of `tokens`; null where not needed).
template <class WordT, class X, class T>
static void residual_backward(const X* grad, int64_t row, int64_t count, int64_t width, const Residual& residual,
                              const Norm& norm, const T* total, float* grad_total, WordT* panel, WordT* columns,
                              int64_t token, int64_t tokens, const RowSums& sums) {
  const Drop drop(residual.dropout);
  if (!residual.pre) {
    for (int64_t i = 0; i < count * width; i += kLanes)
      store_part(grad_total + i, load_part(grad + i, count * width - i), count * width - i);
    norm_backward(total, grad_total, count, width, norm, grad_total, sums.norm_weight, sums.norm_bias);
  }
  const auto grad_u = [&](int64_t i, int64_t c, int64_t n) {
    const int64_t at = i * width + c;
    const Vec g = residual.pre ? load_part(grad + at, n) : load_part(grad_total + at, n);
    return drop(residual.step * g, row * width + at);
  };
  if constexpr (kAmx<WordT>) {
    fill_panel<WordT>(count, width, panel, nullptr, token, tokens, grad_u, sums.bias);
    if (columns != nullptr)
      panel_to_elements(panel, width, reinterpret_cast<bf16*>(columns) + token * width);
  } else {
    fill_panel(count, width, panel, columns, token, tokens, grad_u, sums.bias);
  }
}

// grad_x from the gradient in N(x), a panel of floats, and that of the sum (see residual_backward).
template <class X>
static void input_backward(const float* grad_normalized, const X* grad, const float* grad_total, int64_t count,
                           int64_t width, const Residual& residual, const Norm& norm, const X* x, X* grad_x,
                           float* scratch, const RowSums& sums) {
  panel_to_rows(grad_normalized, count, width, [&](int64_t i, int64_t c, Vec v, int64_t n) {
    store_part(scratch + i * width + c, v, n);
  });
  if (residual.pre) norm_backward(x, scratch, count, width, norm, scratch, sums.norm_weight, sums.norm_bias);
  if (grad_x == nullptr) return;
  for (int64_t at = 0; at < count * width; at += kLanes) {
    const int64_t n = count * width - at;
    const Vec sum = residual.pre ? load_part(grad + at, n) : load_part(grad_total + at, n);
    store_part(grad_x + at, load_part(scratch + at, n) + residual.scale * sum, n);
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA
