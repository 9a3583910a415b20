// The operators' arguments, as their launchers get them: contiguous tensors on the current device. What is null is not
// given, or not asked for. No header of torch, and none of CUDA.
#pragma once

#include <cstdint>

namespace macaron_ops::cuda {

enum class Dtype { float32, bfloat16, float16 };
enum class Direction : int { tangent, difference, ambient };  // the order of macaron_ops/native/cuda/names.py
enum class Norm : int { layer, rms, sphere };

// y = S(x + step v)
struct Step {
  float number;
  const float* tensor;  // (width,) or, if not per_channel, (1,); else `number`
  bool per_channel;
  Direction direction;
  float eps;
};

struct NormalizeStep {
  Dtype dtype;
  int64_t rows;
  int width;
  Step step;
  const void *x, *u;
  void* y;
  // backward
  const void* grad;
  void *grad_x, *grad_u;
  float* partial;  // (blocks, width or 1): the blocks' shares of the step's gradient
  int64_t blocks;
};

int64_t normalize_step_blocks(const NormalizeStep&);  // of the backward pass
void normalize_step_forward(const NormalizeStep&, void* stream);
void normalize_step_backward(const NormalizeStep&, void* stream);

// n = N(s) weight + bias with s = a x + c z, and backward.
struct NormRows {
  Dtype dtype;
  int64_t rows;
  int width;
  Norm norm;
  float eps;
  float a, c;
  const void *x, *z;           // backward: x is s, z is not looked at
  const float *weight, *bias;  // (width,)
  void *sum, *n;               // s, if it is to be kept, and n
  // backward: dx = N'(grad weight) + a residual
  const void *grad, *residual;
  void* grad_x;
  float *partial_weight, *partial_bias;  // (blocks, width)
  int64_t blocks;
};

int64_t norm_rows_blocks(const NormRows&);  // of the backward pass
void norm_rows_forward(const NormRows&, void* stream);
void norm_rows_backward(const NormRows&, void* stream);

enum class Activation : int { relu, gelu, gelu_tanh, silu };

// y = a x + c (W_out act(W_in N(x) + b_in) + b_out), in 16 bits.
struct FfnStep {
  Dtype dtype;
  int64_t rows;
  int width, hidden;  // multiples of 8, width at most 256
  bool normalised;
  Norm norm;
  float eps;
  Activation activation;
  float a, c;
  const void *x, *w_in, *w_out;
  const float *b_in, *b_out, *norm_weight, *norm_bias;
  void* y;
  // backward, with h = W_in N(x) + b_in
  const void* grad;
  void *activated, *grad_hidden;  // (rows, hidden): c act(h), the gradient of h
  void* grad_n;                   // (rows, width): that of N(x)
};

void ffn_step_forward(const FfnStep&, void* stream);
void ffn_step_backward(const FfnStep&, void* stream);

// Particles, all in float32. `query`, `key` and `value` are x where they are not given.
struct SphereAttendStep {
  int64_t batch;
  int rows, keys;        // of a batch element
  int width, channels;   // of x and value; of query and key: both at most 16
  Step step;
  float beta;
  const float* beta_tensor;  // (1,); else `beta`
  bool softmax, causal;
  const float *x, *query, *key, *value;
  bool same;  // key and value are one tensor
  float* y;
  // What backward forms the weights from, w_ij = 2^(beta log2(e) <q_i, k_j> - shift_i) / total_i, and where they led.
  float *u, *shift, *total;  // (batch, rows, width), (batch, rows), (batch, rows)
};

// What of it goes into x's gradient, and which gradients there are.
struct SphereGradients {
  const float* grad;
  float* x;                       // what the step alone gives
  float *query, *key, *value;     // any of them may be x's; null: not needed
  bool add_query, add_key, add_value;
  float *g, *offset;              // (batch, rows, width), (batch, rows): between the passes
  float* slope;                   // (batch, rows): the rows' terms of beta's gradient
  float* partial;                 // (blocks, width or 1): the blocks' shares of the step's gradient
  int64_t blocks;
  bool need_pairs;                // more than x past the attention, and the step
};

void sphere_attend_step_forward(const SphereAttendStep&, void* stream);
int64_t sphere_attend_step_blocks(const SphereAttendStep&);  // of the step's gradient
void sphere_attend_step_backward(const SphereAttendStep&, const SphereGradients&, void* stream);

}  // namespace macaron_ops::cuda
