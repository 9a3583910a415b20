// The operators' arguments as kernels get them: sizes, options and raw pointers, checked by the torch side.
//
// Tensors are contiguous. `x`, `y` and their gradients are in X, matrix parameters and what is saved of products in W:
// (float, float), (bf16, bf16), or (float, bf16) as autocast asks. Vector parameters (biases, norm weights, step per
// channel) are float in either case. Pointers to what is absent, or not needed, are null.
#pragma once

#include "host.h"
#include "types.h"

namespace macaron_ops {

enum class NormKind : int { none, layer, rms, sphere };
enum class Activation : int { relu, gelu, gelu_tanh, silu, swiglu, geglu };
enum class Direction : int { tangent, difference, ambient };
enum class Weighting : int { softmax, unnormalized };

constexpr bool is_gated(Activation a) { return a == Activation::swiglu || a == Activation::geglu; }

struct Norm {
  NormKind kind;
  float eps;
  const float* weight;  // (width,)
  const float* bias;    // (width,)
};

struct Dropout {
  double p;  // 0: none
  uint64_t seed;
  int64_t stream;
};

struct Residual {  // y = scale x + step drop(u), normalised before (pre) or after
  float step, scale;
  bool pre;
  Dropout dropout;
};

template <class X, class W>
struct FFNStep {
  int64_t rows, width, hidden;
  Norm norm;
  Residual residual;
  Activation activation;
  Dropout activation_dropout;
  const X* x;          // (rows, width)
  const W* w_in;       // (hidden, width), gated (2 hidden, width)
  const float* b_in;   // (hidden,), gated (2 hidden,)
  const W* w_out;      // (width, hidden)
  const float* b_out;  // (width,)
  // forward writes, backward reads where it is there
  W* saved_hidden;  // pre-activations in panels: (ceil(rows / 32), hidden or 2 hidden, 32)
  X* saved_total;   // post placement: the sum before its normalisation (rows, width)
  // forward only
  X* y;  // (rows, width)
  // backward only
  const X* grad;  // (rows, width)
  X* grad_x;      // (rows, width)
  W *grad_w_in, *grad_w_out;
  float *grad_b_in, *grad_b_out, *grad_norm_weight, *grad_norm_bias;
};

// -- on the unit sphere: everything that is not x, or like x, is float; nothing has a parameter matrix ---------------

struct Move {  // y = S(x + step v(x, u)), S(z) = z / max(|z|, eps)
  Direction direction;
  float eps;
  float step;                 // where channel_step is null
  const float* channel_step;  // (width,)
};

template <class X>
struct NormalizeStep {
  int64_t rows, width;
  Move move;
  const X *x, *u;  // (rows, width)
  // forward only
  X* y;  // (rows, width)
  // backward only
  const X* grad;       // (rows, width)
  X *grad_x, *grad_u;  // (rows, width)
  float* grad_step;    // (width,) with channel_step, else (1,)
};

template <class X>
struct SphereAttendStep {
  int64_t batch, rows, keys, width, channels;  // channels: of query and key; width: of x and value
  Move move;
  Weighting weighting;
  bool causal;
  float beta;
  const X* x;      // (batch, rows, width)
  const X* query;  // (batch, rows, channels); null: x
  const X* key;    // (batch, keys, channels); null: x
  const X* value;  // (batch, keys, width); null: x
  // forward writes where they are there, backward reads
  float* saved_u;      // (batch, rows, width)
  float* saved_shift;  // (batch, rows): w_ij = exp(beta <q_i, k_j> - shift_i) / total_i
  float* saved_total;  // (batch, rows)
  // forward only
  X* y;  // (batch, rows, width)
  // backward only; what belongs to an absent query, key or value is part of grad_x
  const X* grad;                              // (batch, rows, width)
  X *grad_x, *grad_query, *grad_key, *grad_value;
  float* grad_step;  // (width,) with channel_step, else (1,)
  float* grad_beta;  // (1,)
};

// -- attention -------------------------------------------------------------------------------------------------------

template <class X>
struct GivenMasks {  // blocked: true is not seen; bias: added to the scores
  const bool* pairs_blocked;
  const X* pairs_bias;
  int64_t strides[4];  // of the pairs' (B, H, T, S), 0 where broadcast
  const bool* keys_blocked;  // (B, S)
  const X* keys_bias;
};

template <class X, class W>
struct AttendStep {
  int64_t batch, tokens, keys;         // B, T, S
  int64_t width, source_width;         // of x, and of what keys and values come from
  int64_t heads, kv_heads, head_dim;
  Norm norm;
  Residual residual;
  Dropout attention_dropout;
  float scale;
  bool causal;
  const X* x;        // (B, T, width)
  const W* context;  // (B, S, source_width); null: keys and values come from N(x)
  bool packed;       // q's, k's and v's weights are one matrix, and so are their gradients; biases alike
  const W *w_q, *w_k, *w_v;  // (heads head_dim, width), (kv_heads head_dim, source_width) twice
  const float *b_q, *b_k, *b_v;
  const W* w_out;      // (width, heads head_dim)
  const float* b_out;  // (width,)
  GivenMasks<X> masks;
  const int32_t* borders;  // (sequences + 1,): where sequences begin that are packed into the T tokens; null: one
  int64_t sequences;
  const float *cos, *sin;  // (T, rotated); null: no rotary embedding
  int64_t rotated;         // pairs of channels
  const float* qk_scale;   // (head_dim,), or (heads, head_dim) with qk_scale_per_head; null: q and k as they are
  bool qk_scale_per_head;
  // forward writes, backward reads where it is there
  void *saved_q, *saved_k, *saved_v;  // projections in panels of heads (heads.h)
  W* saved_attended;        // in panels: (ceil(B T / 32), heads head_dim, 32)
  float* saved_statistics;  // (B, heads, 2, T): weights are exp(scores - first) * second
  X* saved_total;           // post placement: the sum before its normalisation (B, T, width)
  // forward only
  X* y;  // (B, T, width)
  // backward only
  const X* grad;  // (B, T, width)
  X* grad_x;      // (B, T, width)
  W* grad_context;
  W *grad_w_q, *grad_w_k, *grad_w_v, *grad_w_out;
  float *grad_b_q, *grad_b_k, *grad_b_v, *grad_b_out, *grad_norm_weight, *grad_norm_bias;
  float *grad_pairs_bias, *grad_keys_bias;  // of the masks' own shapes, contiguous
  int64_t grad_strides[4];                  // of grad_pairs_bias as (B, H, T, S), 0 where broadcast
  float* grad_qk_scale;
};

}  // namespace macaron_ops
