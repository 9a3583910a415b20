// ffn_step on tensors, in 16 bits and where x is narrow: macaron_ops/native/cuda/ffn_step.py says when.
#include <tuple>

#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

// A call's arguments, and the tensors that they point to.
struct Call {
  Tensor x, w_in, w_out;
  MaybeTensor held[4];
  FfnStep arguments{};

  // `norm` is -1 where there is none.
  Call(const Tensor& x_, const Tensor& w_in_, const MaybeTensor& b_in, const Tensor& w_out_, const MaybeTensor& b_out,
       const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, int64_t norm, double eps, int64_t activation,
       double step, double residual_scale)
      : x(dense(x_)), w_in(dense(w_in_)), w_out(dense(w_out_)) {
    FfnStep& a = arguments;
    a.dtype = dtype_of(x);
    a.rows = rows_of(x);
    a.width = int(width_of(x));
    a.hidden = int(w_in.size(0));
    a.normalised = norm >= 0;
    a.norm = Norm(norm);
    a.eps = float(eps);
    a.activation = Activation(activation);
    a.a = float(residual_scale);
    a.c = float(step);
    a.x = read(x);
    a.w_in = read(w_in);
    a.w_out = read(w_out);
    a.b_in = vector_of(b_in, held[0]);
    a.b_out = vector_of(b_out, held[1]);
    a.norm_weight = vector_of(norm_weight, held[2]);
    a.norm_bias = vector_of(norm_bias, held[3]);
  }
};

Tensor forward(Tensor x, Tensor w_in, MaybeTensor b_in, Tensor w_out, MaybeTensor b_out, MaybeTensor norm_weight,
               MaybeTensor norm_bias, int64_t norm, double eps, int64_t activation, double step, double residual_scale) {
  const OnDevice device(x);
  Call call(x, w_in, b_in, w_out, b_out, norm_weight, norm_bias, norm, eps, activation, step, residual_scale);
  const Tensor y = empty_like(call.x);
  call.arguments.y = write(y);
  if (x.numel() > 0) ffn_step_forward(call.arguments, device.stream);
  return y;
}

// (rows, F) twice and (rows, D): c act(h), the gradient of h and that of N(x); empty where not needed.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor w_in, MaybeTensor b_in, Tensor w_out,
                                            MaybeTensor norm_weight, MaybeTensor norm_bias, int64_t norm, double eps,
                                            int64_t activation, double step, bool need_activated, bool need_hidden,
                                            bool need_n) {
  const OnDevice device(x);
  Call call(x, w_in, b_in, w_out, MaybeTensor(), norm_weight, norm_bias, norm, eps, activation, step, 1.0);
  FfnStep& a = call.arguments;
  grad = dense(grad);
  a.grad = read(grad);
  const auto allocate = [&](bool needed, int64_t columns, void*& data) {
    const Tensor t = needed ? empty(x, {a.rows, columns}, x.scalar_type()) : nothing(x, x.scalar_type());
    if (needed) data = write(t);
    return t;
  };
  const Tensor activated = allocate(need_activated, a.hidden, a.activated);
  const Tensor grad_hidden = allocate(need_hidden, a.hidden, a.grad_hidden);
  const Tensor grad_n = allocate(need_n, a.width, a.grad_n);
  if (x.numel() > 0) ffn_step_backward(a, device.stream);
  return {activated, grad_hidden, grad_n};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def(
      "ffn_step_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? norm_weight,"
      " Tensor? norm_bias, int norm, float eps, int activation, float step, float residual_scale) -> Tensor");
  m.def(
      "ffn_step_backward(Tensor grad, Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? norm_weight,"
      " Tensor? norm_bias, int norm, float eps, int activation, float step, bool need_activated, bool need_hidden,"
      " bool need_n) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("ffn_step_forward", TORCH_BOX(&forward));
  m.impl("ffn_step_backward", TORCH_BOX(&backward));
}

}  // namespace macaron_ops::cuda
