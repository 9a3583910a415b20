// ffn_step on tensors. The fields are those of Tensors, Options and Saved of macaron_ops/reference/ffn_step.py.
#include "kernels.h"
#include "operators.h"

namespace macaron_ops {
namespace {

enum Field { w_in, b_in, w_out, b_out, norm_weight, norm_bias, seed };

template <class X, class W>
FFNStep<X, W> arguments(Call& call) {
  FFNStep<X, W> a{};
  a.rows = call.rows();
  a.width = call.width();
  a.hidden = call.size(w_out, 1);
  a.norm.kind = call.choice<NormKind>();
  a.norm.eps = call.real();
  a.norm.weight = call.floats(norm_weight);
  a.norm.bias = call.floats(norm_bias);
  a.activation = call.choice<Activation>();
  a.residual.step = call.real();
  a.residual.scale = call.real();
  a.residual.pre = call.flag();
  const double dropout = call.number(), activation_dropout = call.number();
  const int64_t stream = call.whole();
  a.residual.dropout = call.dropout(dropout, seed, stream);
  a.activation_dropout = call.dropout(activation_dropout, seed, stream + 1);
  a.x = static_cast<const X*>(call.x.const_data_ptr());
  a.w_in = call.data<W>(w_in);
  a.b_in = call.floats(b_in);
  a.w_out = call.data<W>(w_out);
  a.b_out = call.floats(b_out);
  return a;
}

Tensors forward(Call& call) {
  const ScalarType x_dtype = call.x.scalar_type(), w_dtype = call.tensors[w_in]->scalar_type();
  return with_dtypes(x_dtype, w_dtype, [&](auto x, auto w) -> Tensors {
    using X = decltype(x);
    using W = decltype(w);
    FFNStep<X, W> a = arguments<X, W>(call);
    Tensor y = empty(shape_of(call.x), x_dtype), hidden = nothing(w_dtype), total = nothing(x_dtype);
    a.y = static_cast<X*>(y.mutable_data_ptr());
    if (call.save == Save::fast) {
      hidden = empty({(a.rows + 31) / 32, call.size(w_in, 0), 32}, w_dtype);
      a.saved_hidden = static_cast<W*>(hidden.mutable_data_ptr());
      if (!a.residual.pre) {
        total = empty(shape_of(call.x), x_dtype);
        a.saved_total = static_cast<X*>(total.mutable_data_ptr());
      }
    }
    kernels<X, W>().ffn_step_forward(a, torch_host());
    return {y, hidden, total};
  });
}

Tensors backward(Call& call, const Tensor& grad, Gradients& gradients, const Tensor* saved) {
  return with_dtypes(call.x.scalar_type(), call.tensors[w_in]->scalar_type(), [&](auto x, auto w) -> Tensors {
    using X = decltype(x);
    using W = decltype(w);
    FFNStep<X, W> a = arguments<X, W>(call);
    a.grad = static_cast<const X*>(grad.const_data_ptr());
    if (saved[0].numel() > 0) a.saved_hidden = static_cast<W*>(saved[0].mutable_data_ptr());
    if (saved[1].numel() > 0) a.saved_total = static_cast<X*>(saved[1].mutable_data_ptr());
    a.grad_x = gradients.data<X>(0);
    a.grad_w_in = gradients.data<W>(1 + w_in);
    a.grad_b_in = gradients.floats(1 + b_in);
    a.grad_w_out = gradients.data<W>(1 + w_out);
    a.grad_b_out = gradients.floats(1 + b_out);
    a.grad_norm_weight = gradients.floats(1 + norm_weight);
    a.grad_norm_bias = gradients.floats(1 + norm_bias);
    kernels<X, W>().ffn_step_backward(a, torch_host());
    return gradients.finish();
  });
}

}  // namespace

const Operator ffn_step{"ffn_step", 2, forward, backward};

}  // namespace macaron_ops
