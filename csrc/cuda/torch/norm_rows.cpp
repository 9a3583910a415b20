// norm_rows on tensors: macaron_ops/native/cuda/norm_rows.py says what they are.
#include <tuple>

#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

NormRows arguments(const Tensor& x, int64_t norm, double eps) {
  NormRows a{};
  a.dtype = dtype_of(x);
  a.rows = rows_of(x);
  a.width = int(width_of(x));
  a.norm = Norm(norm);
  a.eps = float(eps);
  a.a = 1.f;
  a.x = read(x);
  return a;
}

std::tuple<Tensor, Tensor> forward(Tensor x, MaybeTensor z, MaybeTensor weight, MaybeTensor bias, double residual_scale,
                                   double step, int64_t norm, double eps, bool keep_sum) {
  const OnDevice device(x);
  x = dense(x);
  const Tensor n = empty_like(x), sum = keep_sum ? empty_like(x) : nothing(x, x.scalar_type());
  if (x.numel() == 0) return {n, sum};
  MaybeTensor held_z, held_weight, held_bias;
  NormRows a = arguments(x, norm, eps);
  a.a = float(residual_scale);
  a.c = float(step);
  if (z.has_value()) {
    held_z = dense(*z);
    a.z = read(*held_z);
  }
  a.weight = vector_of(weight, held_weight);
  a.bias = vector_of(bias, held_bias);
  a.n = write(n);
  a.sum = keep_sum ? write(sum) : nullptr;
  norm_rows_forward(a, device.stream);
  return {n, sum};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor s, MaybeTensor weight, MaybeTensor residual,
                                            double residual_scale, int64_t norm, double eps, bool need_s,
                                            bool need_weight, bool need_bias) {
  const OnDevice device(s);
  s = dense(s);
  grad = dense(grad);
  const Gradient grad_s(s, need_s);
  MaybeTensor held_residual, held_weight, partial_weight, partial_bias;
  NormRows a = arguments(s, norm, eps);
  a.a = float(residual_scale);
  a.weight = vector_of(weight, held_weight);
  a.grad = read(grad);
  a.grad_x = grad_s.data;
  if (residual.has_value()) {
    held_residual = dense(*residual);
    a.residual = read(*held_residual);
  }
  const bool any = s.numel() > 0;
  a.blocks = any ? norm_rows_blocks(a) : 0;
  const auto partial = [&](MaybeTensor& held) {
    held = empty(s, {a.blocks, a.width}, ScalarType::Float);
    return write<float>(*held);
  };
  if (need_weight) a.partial_weight = partial(partial_weight);
  if (need_bias) a.partial_bias = partial(partial_bias);
  if (any) norm_rows_backward(a, device.stream);
  const auto sum = [&](bool needed, const MaybeTensor& of_blocks) {
    const Tensor like = empty(s, {needed ? a.width : 0}, ScalarType::Float);
    return needed ? sum_of_blocks(*of_blocks, like) : like;
  };
  return {grad_s.tensor, sum(need_weight, partial_weight), sum(need_bias, partial_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def(
      "norm_rows_forward(Tensor x, Tensor? z, Tensor? weight, Tensor? bias, float residual_scale, float step, int norm,"
      " float eps, bool keep_sum) -> (Tensor, Tensor)");
  m.def(
      "norm_rows_backward(Tensor grad, Tensor s, Tensor? weight, Tensor? residual, float residual_scale, int norm,"
      " float eps, bool need_s, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("norm_rows_forward", TORCH_BOX(&forward));
  m.impl("norm_rows_backward", TORCH_BOX(&backward));
}

}  // namespace macaron_ops::cuda
