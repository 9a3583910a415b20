// sphere_attend_step on tensors. The tensors and options are those of macaron_ops/reference/sphere_attend_step.py.
#include <tuple>

#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

// A call's arguments, and the tensors that they point to: in float32, whatever the dtype of x. What 16 bits cost in
// memory is linear, the arithmetic is quadratic.
struct Call {
  Tensor x;
  MaybeTensor query, key, value, step_tensor, beta_tensor;
  SphereAttendStep arguments{};

  Call(const Tensor& x_, const MaybeTensor& query_, const MaybeTensor& key_, const MaybeTensor& value_,
       const MaybeTensor& step_, const MaybeTensor& beta_, double step, double beta, bool softmax, int64_t direction,
       bool causal, double eps)
      : x(in_float(x_)), query(in_float(query_)), key(in_float(key_)), value(in_float(value_)), beta_tensor(in_float(beta_)) {
    SphereAttendStep& a = arguments;
    a.rows = int(x.size(x.dim() - 2));
    a.width = int(width_of(x));
    a.batch = a.rows == 0 ? 0 : rows_of(x) / a.rows;
    a.keys = key.has_value() ? int(key->size(key->dim() - 2)) : a.rows;
    a.channels = query.has_value() ? int(width_of(*query)) : a.width;
    a.step = step_of(step_, step, direction, eps, step_tensor);
    a.beta = float(beta);
    if (beta_tensor.has_value()) a.beta_tensor = read<float>(*beta_tensor);
    a.softmax = softmax;
    a.causal = causal;
    a.x = read<float>(x);
    a.query = query.has_value() ? read<float>(*query) : a.x;
    a.key = key.has_value() ? read<float>(*key) : a.x;
    a.value = value.has_value() ? read<float>(*value) : a.x;
    a.same = a.key == a.value && a.channels == a.width;
  }

 private:
  static MaybeTensor in_float(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(cuda::in_float(*t)) : t; }
  static Tensor in_float(const Tensor& t) { return cuda::in_float(t); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor query, MaybeTensor key, MaybeTensor value,
                                                   MaybeTensor step_tensor, MaybeTensor beta_tensor, double step,
                                                   double beta, bool softmax, int64_t direction, bool causal, double eps,
                                                   bool save) {
  const OnDevice device(x);
  Call call(x, query, key, value, step_tensor, beta_tensor, step, beta, softmax, direction, causal, eps);
  SphereAttendStep& a = call.arguments;
  const Tensor y = empty_like(call.x);
  Tensor u = nothing(x, ScalarType::Float), shift = u, total = u;
  if (save) {
    std::vector<int64_t> rows = shape_of(x);
    u = empty(x, rows, ScalarType::Float);
    rows.pop_back();
    shift = empty(x, rows, ScalarType::Float);
    total = empty(x, rows, ScalarType::Float);
    a.u = write<float>(u);
    a.shift = write<float>(shift);
    a.total = write<float>(total);
  }
  a.y = write<float>(y);
  if (x.numel() > 0) sphere_attend_step_forward(a, device.stream);
  return {in_dtype(y, x.scalar_type()), u, shift, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor x, MaybeTensor query, MaybeTensor key, MaybeTensor value, MaybeTensor step_tensor,
    MaybeTensor beta_tensor, Tensor u, Tensor shift, Tensor total, double step, double beta, bool softmax,
    int64_t direction, bool causal, double eps, std::vector<int64_t> needs) {
  const OnDevice device(x);
  const MaybeTensor given[] = {query, key, value, step_tensor, beta_tensor};
  std::vector<Tensor> grads(6, nothing(x, ScalarType::Float));
  const auto need = [&](size_t i) { return needs.at(i) != 0 && (i == 0 || given[i - 1].has_value()); };
  const auto finish = [&] { return std::make_tuple(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]); };
  if (x.numel() == 0) {
    for (size_t i = 0; i < grads.size(); ++i)
      if (need(i)) grads[i] = zeros_like(i == 0 ? x : *given[i - 1]);
    return finish();
  }
  Call call(x, query, key, value, step_tensor, beta_tensor, step, beta, softmax, direction, causal, eps);
  SphereAttendStep& a = call.arguments;
  a.u = write<float>(u);
  a.shift = write<float>(shift);
  a.total = write<float>(total);

  SphereGradients b{};
  const Tensor dy = in_float(grad);
  b.grad = read<float>(dy);
  if (need(0)) grads[0] = empty_like(call.x);
  float* grad_x = need(0) ? write<float>(grads[0]) : nullptr;
  b.x = grad_x;
  const MaybeTensor* particles[] = {&call.query, &call.key, &call.value};
  float** targets[] = {&b.query, &b.key, &b.value};
  bool* adds[] = {&b.add_query, &b.add_key, &b.add_value};
  for (size_t i = 0; i < 3; ++i) {
    *adds[i] = !particles[i]->has_value();
    if (*adds[i]) {
      *targets[i] = grad_x;
    } else if (need(i + 1)) {
      grads[i + 1] = a.keys > 0 || i == 0 ? empty_like(**particles[i]) : zeros_like(**particles[i]);
      *targets[i] = write<float>(grads[i + 1]);
    }
  }
  b.need_pairs = b.query != nullptr || b.key != nullptr || b.value != nullptr || need(5);
  const std::vector<int64_t> rows{a.batch * a.rows};
  std::vector<Tensor> kept;
  const auto allocate = [&](std::vector<int64_t> shape) {
    return write<float>(kept.emplace_back(empty(x, shape, ScalarType::Float)));
  };
  if (b.need_pairs) {
    b.g = allocate({rows[0], a.width});
    b.offset = allocate(rows);
  }
  Tensor slope = nothing(x, ScalarType::Float), partial = slope;
  if (need(5)) {
    slope = empty(x, rows, ScalarType::Float);
    b.slope = write<float>(slope);
  }
  b.blocks = sphere_attend_step_blocks(a);
  if (need(4)) {
    partial = empty(x, {b.blocks, a.step.per_channel ? a.width : 1}, ScalarType::Float);
    b.partial = write<float>(partial);
  }
  sphere_attend_step_backward(a, b, device.stream);
  for (size_t i = 0; i < 4; ++i)
    if (need(i)) grads[i] = in_dtype(grads[i], i == 0 ? x.scalar_type() : given[i - 1]->scalar_type());
  if (need(4)) grads[4] = sum_of_blocks(partial, *step_tensor);
  if (need(5)) grads[5] = sum_of_blocks(slope, *beta_tensor);
  return finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def(
      "sphere_attend_step_forward(Tensor x, Tensor? query, Tensor? key, Tensor? value, Tensor? step_tensor,"
      " Tensor? beta_tensor, float step, float beta, bool softmax, int direction, bool causal, float eps, bool save)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sphere_attend_step_backward(Tensor grad, Tensor x, Tensor? query, Tensor? key, Tensor? value, Tensor? step_tensor,"
      " Tensor? beta_tensor, Tensor u, Tensor shift, Tensor total, float step, float beta, bool softmax, int direction,"
      " bool causal, float eps, int[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("sphere_attend_step_forward", TORCH_BOX(&forward));
  m.impl("sphere_attend_step_backward", TORCH_BOX(&backward));
}

}  // namespace macaron_ops::cuda
