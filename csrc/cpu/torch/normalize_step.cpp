// normalize_step on tensors. The fields are those of Tensors and Options of macaron_ops/reference/normalize_step.py.
#include "kernels.h"
#include "move.h"
#include "operators.h"

namespace macaron_ops {
namespace {

enum Field { u, step_tensor };

template <class X>
NormalizeStep<X> arguments(Call& call) {
  NormalizeStep<X> a{};
  a.rows = call.rows();
  a.width = call.width();
  set_step(a.move, call, call.real(), step_tensor);
  a.move.direction = call.choice<Direction>();
  a.move.eps = call.real();
  a.x = static_cast<const X*>(call.x.const_data_ptr());
  a.u = call.data<X>(u);
  return a;
}

Tensors forward(Call& call) {
  return with_dtype(call.x.scalar_type(), [&](auto x) -> Tensors {
    using X = decltype(x);
    NormalizeStep<X> a = arguments<X>(call);
    Tensor y = empty(shape_of(call.x), call.x.scalar_type());
    a.y = static_cast<X*>(y.mutable_data_ptr());
    sphere_kernels<X>().normalize_step_forward(a, torch_host());
    return {y};
  });
}

Tensors backward(Call& call, const Tensor& grad, Gradients& gradients, const Tensor*) {
  return with_dtype(call.x.scalar_type(), [&](auto x) -> Tensors {
    using X = decltype(x);
    NormalizeStep<X> a = arguments<X>(call);
    a.grad = static_cast<const X*>(grad.const_data_ptr());
    a.grad_x = gradients.data<X>(0);
    a.grad_u = gradients.data<X>(1 + u);
    a.grad_step = gradients.floats(1 + step_tensor);
    sphere_kernels<X>().normalize_step_backward(a, torch_host());
    return gradients.finish();
  });
}

}  // namespace

const Operator normalize_step{"normalize_step", 0, forward, backward};

}  // namespace macaron_ops
