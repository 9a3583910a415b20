// normalize_step on tensors. The tensors and options are those of macaron_ops/reference/normalize_step.py.
#include <tuple>

#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

Tensor forward(Tensor x, Tensor u, MaybeTensor step_tensor, double step, int64_t direction, double eps) {
  const OnDevice device(x);
  x = dense(x);
  u = dense(u);
  Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  MaybeTensor held;
  NormalizeStep a{};
  a.dtype = dtype_of(x);
  a.rows = rows_of(x);
  a.width = int(width_of(x));
  a.step = step_of(step_tensor, step, direction, eps, held);
  a.x = read(x);
  a.u = read(u);
  a.y = write(y);
  normalize_step_forward(a, device.stream);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor u, MaybeTensor step_tensor, double step,
                                            int64_t direction, double eps, bool need_x, bool need_u, bool need_step) {
  const OnDevice device(x);
  grad = dense(grad);
  x = dense(x);
  u = dense(u);
  const Gradient grad_x(x, need_x), grad_u(u, need_u);
  const Tensor none = nothing(x, x.scalar_type());
  if (x.numel() == 0) return {grad_x.tensor, grad_u.tensor, need_step ? zeros_like(*step_tensor) : none};
  MaybeTensor held;
  NormalizeStep a{};
  a.dtype = dtype_of(x);
  a.rows = rows_of(x);
  a.width = int(width_of(x));
  a.step = step_of(step_tensor, step, direction, eps, held);
  a.x = read(x);
  a.u = read(u);
  a.grad = read(grad);
  a.grad_x = grad_x.data;
  a.grad_u = grad_u.data;
  if (!need_step) {
    normalize_step_backward(a, device.stream);
    return {grad_x.tensor, grad_u.tensor, none};
  }
  a.blocks = normalize_step_blocks(a);
  const Tensor partial = empty(x, {a.blocks, a.step.per_channel ? width_of(x) : 1}, ScalarType::Float);
  a.partial = write<float>(partial);
  normalize_step_backward(a, device.stream);
  return {grad_x.tensor, grad_u.tensor, sum_of_blocks(partial, *step_tensor)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def("normalize_step_forward(Tensor x, Tensor u, Tensor? step_tensor, float step, int direction, float eps) -> Tensor");
  m.def(
      "normalize_step_backward(Tensor grad, Tensor x, Tensor u, Tensor? step_tensor, float step, int direction, float eps,"
      " bool need_x, bool need_u, bool need_step) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("normalize_step_forward", TORCH_BOX(&forward));
  m.impl("normalize_step_backward", TORCH_BOX(&backward));
}

}  // namespace macaron_ops::cuda
