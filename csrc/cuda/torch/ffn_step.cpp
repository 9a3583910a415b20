// ffn_step on tensors, forward, in 16 bits and where x is narrow: macaron_ops/native/cuda/ffn_step.py says when.
#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

// `norm` is -1 where there is none.
Tensor forward(Tensor x, Tensor w_in, MaybeTensor b_in, Tensor w_out, MaybeTensor b_out, MaybeTensor norm_weight,
               MaybeTensor norm_bias, int64_t norm, double eps, int64_t activation, double step, double residual_scale) {
  const OnDevice device(x);
  x = dense(x);
  w_in = dense(w_in);
  w_out = dense(w_out);
  const Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  MaybeTensor held[4];
  FfnStep a{};
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
  a.y = write(y);
  ffn_step_forward(a, device.stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def(
      "ffn_step_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? norm_weight,"
      " Tensor? norm_bias, int norm, float eps, int activation, float step, float residual_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("ffn_step_forward", TORCH_BOX(&forward));
}

}  // namespace macaron_ops::cuda
