// y = S(x + step v(x, u)): reads x and u, writes y. The limit is memory.
#include "move.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <class X>
void normalize_step_forward(const NormalizeStep<X>& a, const Host& host) {
  parallel(host, ceil_div(a.rows, kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * kPanel * a.width, count = smaller<int64_t>(kPanel, a.rows - p * kPanel);
      move_rows(a.move, a.width, count, a.x + at, a.u + at, a.y + at);
    }
  });
}

template <class X>
void normalize_step_backward(const NormalizeStep<X>& a, const Host& host) {
  const int64_t panels = ceil_div(a.rows, kPanel);
  const StepSums steps(host, a.move, a.width, panels, a.grad_step);
  parallel(host, steps.chunks(), [&](int64_t begin, int64_t end) {
    const Buffer<double> buffer(host, steps.doubles());
    double* sums = buffer;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      steps.begin(sums);
      for (int64_t p = chunk * steps.kChunk; p < smaller(panels, (chunk + 1) * steps.kChunk); ++p) {
        const int64_t at = p * kPanel * a.width, count = smaller<int64_t>(kPanel, a.rows - p * kPanel);
        move_rows_backward(a.move, a.width, count, a.grad + at, a.x + at, a.u + at,
                           a.grad_x != nullptr ? a.grad_x + at : nullptr,
                           a.grad_u != nullptr ? a.grad_u + at : nullptr, sums);
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
