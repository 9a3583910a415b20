// sphere_attend_step on tensors. The fields are those of Tensors and Options of
// macaron_ops/reference/sphere_attend_step.py.
#include "kernels.h"
#include "move.h"
#include "operators.h"

namespace macaron_ops {
namespace {

enum Field { query, key, value, step_tensor, beta_tensor };

template <class X>
SphereAttendStep<X> arguments(Call& call) {
  SphereAttendStep<X> a{};
  const int64_t dims = call.x.dim();
  a.rows = call.x.size(dims - 2);
  a.width = call.width();
  a.batch = a.rows == 0 ? 0 : call.rows() / a.rows;
  a.keys = call.has(key) ? call.size(key, dims - 2) : a.rows;
  a.channels = call.has(query) ? call.size(query, dims - 1) : a.width;
  set_step(a.move, call, call.real(), step_tensor);
  a.beta = call.real();
  if (call.has(beta_tensor)) a.beta = *call.floats(beta_tensor);
  a.weighting = call.choice<Weighting>();
  a.move.direction = call.choice<Direction>();
  a.causal = call.flag();
  a.move.eps = call.real();
  a.x = static_cast<const X*>(call.x.const_data_ptr());
  a.query = call.data<X>(query);
  a.key = call.data<X>(key);
  a.value = call.data<X>(value);
  return a;
}

Tensors forward(Call& call) {
  return with_dtype(call.x.scalar_type(), [&](auto x) -> Tensors {
    using X = decltype(x);
    SphereAttendStep<X> a = arguments<X>(call);
    Tensor y = empty(shape_of(call.x), call.x.scalar_type());
    Tensor u = nothing(ScalarType::Float), shift = u, total = u;
    a.y = static_cast<X*>(y.mutable_data_ptr());
    if (call.save != Save::none) {
      std::vector<int64_t> shape = shape_of(call.x);
      u = empty(shape, ScalarType::Float);
      shape.pop_back();
      shift = empty(shape, ScalarType::Float);
      total = empty(shape, ScalarType::Float);
      a.saved_u = static_cast<float*>(u.mutable_data_ptr());
      a.saved_shift = static_cast<float*>(shift.mutable_data_ptr());
      a.saved_total = static_cast<float*>(total.mutable_data_ptr());
    }
    sphere_kernels<X>().sphere_attend_step_forward(a, torch_host());
    return {y, u, shift, total};
  });
}

Tensors backward(Call& call, const Tensor& grad, Gradients& gradients, const Tensor* saved) {
  return with_dtype(call.x.scalar_type(), [&](auto x) -> Tensors {
    using X = decltype(x);
    SphereAttendStep<X> a = arguments<X>(call);
    if (call.x.numel() == 0) return gradients.zeros();
    a.saved_u = static_cast<float*>(saved[0].mutable_data_ptr());
    a.saved_shift = static_cast<float*>(saved[1].mutable_data_ptr());
    a.saved_total = static_cast<float*>(saved[2].mutable_data_ptr());
    a.grad = static_cast<const X*>(grad.const_data_ptr());
    a.grad_x = gradients.data<X>(0);
    a.grad_query = gradients.data<X>(1 + query);
    a.grad_key = gradients.data<X>(1 + key);
    a.grad_value = gradients.data<X>(1 + value);
    a.grad_step = gradients.floats(1 + step_tensor);
    a.grad_beta = gradients.floats(1 + beta_tensor);
    sphere_kernels<X>().sphere_attend_step_backward(a, torch_host());
    return gradients.finish();
  });
}

}  // namespace

const Operator sphere_attend_step{"sphere_attend_step", 3, forward, backward};

}  // namespace macaron_ops
