// y = S(x + step v(x, u)): reads x and u once, writes y once. Memory-bound; the panels stay in the first two caches.
#include "move.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <class X>
void normalize_step_forward(const NormalizeStep<X>& a, const Host& host) {
  const int64_t panels = ceil_div(a.rows, kPanel), size = a.width * kPanel;
  parallel(host, panels, [&](int64_t begin, int64_t end) {
    const Buffer<float> buffer(host, 3 * size);
    float *x = buffer, *u = x + size, *y = u + size;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPanel, count = smaller<int64_t>(kPanel, a.rows - first);
      rows_to_panel(a.x + first * a.width, count, a.width, a.width, x);
      rows_to_panel(a.u + first * a.width, count, a.width, a.width, u);
      move_panel(a.move, a.width, count, x, u, y);
      panel_to_rows(y, count, a.width, a.width, a.y + first * a.width);
    }
  });
}

template <class X>
void normalize_step_backward(const NormalizeStep<X>& a, const Host& host) {
  const int64_t panels = ceil_div(a.rows, kPanel), size = a.width * kPanel;
  const StepSums steps(host, a.move, a.width, panels, a.grad_step);
  parallel(host, steps.chunks(), [&](int64_t begin, int64_t end) {
    const Buffer<float> buffer(host, 5 * size + steps.floats());
    float *x = buffer, *u = x + size, *grad = u + size, *grad_x = grad + size, *grad_u = grad_x + size;
    float* sums = a.grad_step != nullptr ? grad_u + size : nullptr;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      steps.begin(sums);
      for (int64_t p = chunk * kChunk; p < smaller(panels, (chunk + 1) * kChunk); ++p) {
        const int64_t first = p * kPanel, count = smaller<int64_t>(kPanel, a.rows - first);
        rows_to_panel(a.x + first * a.width, count, a.width, a.width, x);
        rows_to_panel(a.u + first * a.width, count, a.width, a.width, u);
        rows_to_panel(a.grad + first * a.width, count, a.width, a.width, grad);
        move_backward_panel(a.move, a.width, count, grad, x, u, grad_x, grad_u, sums);
        if (a.grad_x != nullptr) panel_to_rows(grad_x, count, a.width, a.width, a.grad_x + first * a.width);
        if (a.grad_u != nullptr) panel_to_rows(grad_u, count, a.width, a.width, a.grad_u + first * a.width);
      }
      steps.end(chunk, sums);
    }
  });
  steps.finish();
}

template void normalize_step_forward(const NormalizeStep<float>&, const Host&);
template void normalize_step_forward(const NormalizeStep<bf16>&, const Host&);
template void normalize_step_backward(const NormalizeStep<float>&, const Host&);
template void normalize_step_backward(const NormalizeStep<bf16>&, const Host&);

}  // namespace macaron_ops::MACARON_OPS_ISA
