// attend_step on tensors. The fields are those of Tensors and Options of macaron_ops/reference/attend_step.py, and of
// Saved of macaron_ops/native/cpu/attend_step.py.
#include "cpu/head_panels.h"
#include "kernels.h"
#include "operators.h"

namespace macaron_ops {
namespace {

enum Field {
  w_q, w_k, w_v, b_q, b_k, b_v, w_out, b_out, norm_weight, norm_bias, context, attn_mask, key_padding_mask, cu_seqlens,
  cos, sin, qk_scale, seed
};
enum SavedField { queries, keys, values, attended, statistics, total };

template <class T>
void add_mask(const Tensor& mask, const void* data, const bool*& blocked, const T*& bias) {
  if (mask.scalar_type() == ScalarType::Bool) {
    blocked = static_cast<const bool*>(data);
  } else {
    STD_TORCH_CHECK(mask.scalar_type() == kDtype<T>, "attn_mask, key_padding_mask: expected bool or the dtype of x");
    bias = static_cast<const T*>(data);
  }
}

template <class X, class W>
AttendStep<X, W> arguments(Call& call) {
  AttendStep<X, W> a{};
  const Tensor& x = call.x;
  a.batch = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) a.batch *= x.size(i);
  a.tokens = x.size(x.dim() - 2);
  a.width = call.width();
  a.heads = call.whole();
  a.kv_heads = call.whole();
  a.head_dim = call.size(w_out, 1) / a.heads;
  a.norm.kind = call.choice<NormKind>();
  a.norm.eps = call.real();
  a.norm.weight = call.floats(norm_weight);
  a.norm.bias = call.floats(norm_bias);
  a.residual.step = call.real();
  a.residual.scale = call.real();
  a.residual.pre = call.flag();
  a.causal = call.flag();
  a.scale = call.real();
  const double dropout = call.number(), attention_dropout = call.number();
  const int64_t stream = call.whole();
  a.residual.dropout = call.dropout(dropout, seed, stream);
  a.attention_dropout = call.dropout(attention_dropout, seed, stream + 1);

  const int64_t rows = a.heads * a.head_dim, kv_rows = a.kv_heads * a.head_dim;
  a.x = static_cast<const X*>(x.const_data_ptr());
  a.keys = call.has(context) ? call.size(context, x.dim() - 2) : a.tokens;
  a.source_width = call.has(context) ? call.size(context, x.dim() - 1) : a.width;
  a.w_q = call.data<W>(w_q);
  a.context = call.data<W>(context);
  if (call.has(context) && a.context == nullptr) a.context = a.w_q;  // an empty one: nothing of it is read
  a.b_q = call.floats(b_q);
  a.packed = !call.has(w_k);
  if (!a.packed) {
    a.w_k = call.data<W>(w_k);
    a.w_v = call.data<W>(w_v);
    a.b_k = call.floats(b_k);
    a.b_v = call.floats(b_v);
  } else {  // q, k and v packed in one
    a.w_k = a.w_q + rows * a.width;
    a.w_v = a.w_k + kv_rows * a.width;
    if (a.b_q != nullptr) a.b_k = a.b_q + rows, a.b_v = a.b_k + kv_rows;
  }
  a.w_out = call.data<W>(w_out);
  a.b_out = call.floats(b_out);

  if (call.has(attn_mask)) {  // read by its strides, never expanded
    const Tensor& mask = *call.tensors[attn_mask];
    add_mask(mask, mask.const_data_ptr(), a.masks.pairs_blocked, a.masks.pairs_bias);
    for (int64_t i = 0; i < 4; ++i)
      a.masks.strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  if (call.has(key_padding_mask))
    add_mask(*call.tensors[key_padding_mask], call.data<void>(key_padding_mask), a.masks.keys_blocked, a.masks.keys_bias);
  if (call.has(cu_seqlens)) {
    a.borders = call.data<int32_t>(cu_seqlens);
    a.sequences = call.size(cu_seqlens, 0) - 1;
    // The kernels write where these say, and the tensor may have come here through a graph, unseen.
    bool rising = a.sequences >= 1 && a.borders[0] == 0 && a.borders[a.sequences] == a.tokens;
    for (int64_t s = 0; s < a.sequences; ++s) rising = rising && a.borders[s] <= a.borders[s + 1];
    STD_TORCH_CHECK(rising, "cu_seqlens: expected borders that rise from 0 to T = ", a.tokens);
  }
  if (call.has(cos)) {
    a.cos = call.floats(cos);
    a.sin = call.floats(sin);
    a.rotated = call.size(cos, 1);
  }
  if (call.has(qk_scale)) {
    a.qk_scale = call.floats(qk_scale);
    a.qk_scale_per_head = call.tensors[qk_scale]->dim() == 2;
  }
  return a;
}

// Words of the panels of all sequences' heads, each as large as a float whatever it holds.
template <class W>
Tensor panels(int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim) {
  const HeadPanels at(tokens, head_dim, sizeof(W) == 2 && words_are_pairs() ? 2 : 1);
  return empty({batch * heads * at.words() + HeadPanels::kSlack}, ScalarType::Float);
}

Tensors forward(Call& call) {
  const ScalarType x_dtype = call.x.scalar_type(), w_dtype = call.tensors[w_q]->scalar_type();
  return with_dtypes(x_dtype, w_dtype, [&](auto x, auto w) -> Tensors {
    using X = decltype(x);
    using W = decltype(w);
    AttendStep<X, W> a = arguments<X, W>(call);
    Tensor y = empty(shape_of(call.x), x_dtype);
    a.y = static_cast<X*>(y.mutable_data_ptr());
    Tensor saved[] = {nothing(ScalarType::Float), nothing(ScalarType::Float), nothing(ScalarType::Float), nothing(w_dtype),
                      nothing(ScalarType::Float), nothing(x_dtype)};
    if (call.save != Save::none) {
      saved[attended] = empty({(a.batch * a.tokens + 31) / 32, a.heads * a.head_dim, 32}, w_dtype);
      saved[statistics] = empty({a.batch, a.heads, 2, a.tokens}, ScalarType::Float);
      a.saved_attended = static_cast<W*>(saved[attended].mutable_data_ptr());
      a.saved_statistics = static_cast<float*>(saved[statistics].mutable_data_ptr());
    }
    if (call.save == Save::fast) {
      saved[queries] = panels<W>(a.batch, a.heads, a.tokens, a.head_dim);
      saved[keys] = panels<W>(a.batch, a.kv_heads, a.keys, a.head_dim);
      saved[values] = panels<W>(a.batch, a.kv_heads, a.keys, a.head_dim);
      a.saved_q = saved[queries].mutable_data_ptr();
      a.saved_k = saved[keys].mutable_data_ptr();
      a.saved_v = saved[values].mutable_data_ptr();
      if (!a.residual.pre) {
        saved[total] = empty(shape_of(call.x), x_dtype);
        a.saved_total = static_cast<X*>(saved[total].mutable_data_ptr());
      }
    }
    kernels<X, W>().attend_step_forward(a, torch_host());
    Tensors out{y};
    out.insert(out.end(), std::begin(saved), std::end(saved));
    return out;
  });
}

Tensors backward(Call& call, const Tensor& grad, Gradients& gradients, const Tensor* saved) {
  return with_dtypes(call.x.scalar_type(), call.tensors[w_q]->scalar_type(), [&](auto x, auto w) -> Tensors {
    using X = decltype(x);
    using W = decltype(w);
    AttendStep<X, W> a = arguments<X, W>(call);
    a.grad = static_cast<const X*>(grad.const_data_ptr());
    a.saved_attended = static_cast<W*>(saved[attended].mutable_data_ptr());
    a.saved_statistics = static_cast<float*>(saved[statistics].mutable_data_ptr());
    if (saved[queries].numel() > 0) {
      a.saved_q = saved[queries].mutable_data_ptr();
      a.saved_k = saved[keys].mutable_data_ptr();
      a.saved_v = saved[values].mutable_data_ptr();
    }
    if (saved[total].numel() > 0) a.saved_total = static_cast<X*>(saved[total].mutable_data_ptr());
    const int64_t rows = a.heads * a.head_dim, kv_rows = a.kv_heads * a.head_dim;
    a.grad_x = gradients.data<X>(0);
    a.grad_context = gradients.data<W>(1 + context);
    a.grad_w_q = gradients.data<W>(1 + w_q);
    a.grad_b_q = gradients.floats(1 + b_q);
    if (!a.packed) {
      a.grad_w_k = gradients.data<W>(1 + w_k);
      a.grad_w_v = gradients.data<W>(1 + w_v);
      a.grad_b_k = gradients.floats(1 + b_k);
      a.grad_b_v = gradients.floats(1 + b_v);
    } else {
      if (a.grad_w_q != nullptr) a.grad_w_k = a.grad_w_q + rows * a.width, a.grad_w_v = a.grad_w_k + kv_rows * a.width;
      if (a.grad_b_q != nullptr) a.grad_b_k = a.grad_b_q + rows, a.grad_b_v = a.grad_b_k + kv_rows;
    }
    a.grad_w_out = gradients.data<W>(1 + w_out);
    a.grad_b_out = gradients.floats(1 + b_out);
    a.grad_norm_weight = gradients.floats(1 + norm_weight);
    a.grad_norm_bias = gradients.floats(1 + norm_bias);
    a.grad_pairs_bias = gradients.floats(1 + attn_mask);
    if (a.grad_pairs_bias != nullptr)
      for (int64_t i = 3, stride = 1; i >= 0; --i) {
        a.grad_strides[i] = call.size(attn_mask, i) == 1 ? 0 : stride;
        stride *= call.size(attn_mask, i);
      }
    a.grad_keys_bias = gradients.floats(1 + key_padding_mask);
    a.grad_qk_scale = gradients.floats(1 + qk_scale);
    kernels<X, W>().attend_step_backward(a, torch_host());
    return gradients.finish();
  });
}

}  // namespace

const Operator attend_step{"attend_step", 6, forward, backward};

}  // namespace macaron_ops
