// The gradients of the narrow ffn_step (ffn_step.cu), as far as a block has them at hand. For its rows, from x and dy:
//
//   h = W_in N(x) + b_in                    again: nothing was kept
//   dh = c (dy W_out) act'(h)               written, with c act(h), for the gradients of weights: products over the rows
//   dn = dh W_in                            the gradient of N(x); norm_rows has the rest of the way to x
//
// Three products, 6 M D F FLOP, in one kernel; 4 M F bytes are written, which the weights' gradients read again. Both
// weights are operands either way round, so that each is copied once and read transposed where need be.
#include "ffn.h"

namespace macaron_ops::cuda {
namespace {

template <int D>
struct NarrowBackward {
  static constexpr int kRows = kFfnWarps * 16;
  static constexpr int kRowsOf = kRows * D, kWeight = kHidden * D;  // elements
  static constexpr size_t kShared = size_t(2 * kRowsOf + 4 * kWeight) * 2;
};

// Two numbers of a row (rows, width), if they are there.
MACARON_DEVICE void store_pair(void* tensor, int64_t row, int64_t rows, int column, int width, uint32_t pair) {
  if (tensor == nullptr || row >= rows || column >= width) return;
  static_cast<uint32_t*>(tensor)[(row * width + column) / 2] = pair;
}

template <class T, int D>
__global__ void __launch_bounds__(kFfnThreads, 2) ffn_backward(FfnStep a) {
  using K = NarrowBackward<D>;
  T *n_rows = shared_memory<T>(), *g_rows = n_rows + K::kRowsOf;
  T* weights = g_rows + K::kRowsOf;  // two stages of (w_in, w_out)
  const int lane = int(threadIdx.x) % kWarp, my_row = int(threadIdx.x) / kWarp * 16;
  const int64_t first = int64_t(blockIdx.x) * K::kRows;
  const int steps = ceil_div(a.hidden, kHidden);
  const auto stage = [&](int i) { return weights + i % 2 * 2 * K::kWeight; };

  copy_weights<T, D>(a, 0, stage(0), stage(0) + K::kWeight);
  copies_commit();
  write_rows<T, D>(a, static_cast<const T*>(a.x), first, n_rows, K::kRows, true);
  write_rows<T, D>(a, static_cast<const T*>(a.grad), first, g_rows, K::kRows, false);

  float dn[D / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy_weights<T, D>(a, (step + 1) * kHidden, stage(step + 1), stage(step + 1) + K::kWeight);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    T *w_in = stage(step), *w_out = w_in + K::kWeight;

    float h[kHidden / 8][4] = {}, da[kHidden / 8][4] = {};
#pragma unroll 2
    for (int k = 0; k < D / 16; ++k) {
      Fragment n, g;
      load_matrices(n, wide_chunk<T, D>(n_rows, my_row + lane % 16, k * 2 + lane / 16));
      load_matrices(g, wide_chunk<T, D>(g_rows, my_row + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int f = 0; f < kHidden / 16; ++f) {
        Fragment w;
        load_matrices(w, wide_chunk<T, D>(w_in, f * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
        multiply_add<T>(h[f * 2], n, w.at[0], w.at[1]);
        multiply_add<T>(h[f * 2 + 1], n, w.at[2], w.at[3]);
        load_transposed(w, hidden_chunk(w_out, k * 16 + lane / 8 % 2 * 8 + lane % 8, f * 2 + lane / 16));
        multiply_add<T>(da[f * 2], g, w.at[0], w.at[1]);
        multiply_add<T>(da[f * 2 + 1], g, w.at[2], w.at[3]);
      }
    }

    Fragment dh[kHidden / 16];
#pragma unroll
    for (int f = 0; f < kHidden / 8; ++f) {
      const int column = step * kHidden + f * 8 + lane % 4 * 2;
      const float b[2] = {at(a.b_in, column, a.hidden), at(a.b_in, column + 1, a.hidden)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first + my_row + r * 8 + lane / 4;
        float activated[2], gradient[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = h[f][r * 2 + i] + b[i];
          activated[i] = a.c * activate(value, a.activation);
          gradient[i] = a.c * da[f][r * 2 + i] * slope(value, a.activation);
        }
        const uint32_t pair = packed<T>(gradient[0], gradient[1]);
        dh[f / 2].at[f % 2 * 2 + r] = pair;
        store_pair(a.grad_hidden, row, a.rows, column, a.hidden, pair);
        store_pair(a.activated, row, a.rows, column, a.hidden, packed<T>(activated[0], activated[1]));
      }
    }

    if (a.grad_n != nullptr)
#pragma unroll
      for (int k = 0; k < kHidden / 16; ++k)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          Fragment w;
          load_transposed(w, wide_chunk<T, D>(w_in, k * 16 + lane / 8 % 2 * 8 + lane % 8, d * 2 + lane / 16));
          multiply_add<T>(dn[d * 2], dh[k], w.at[0], w.at[1]);
          multiply_add<T>(dn[d * 2 + 1], dh[k], w.at[2], w.at[3]);
        }
    __syncthreads();  // the next copies overwrite this stage
  }

#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      store_pair(a.grad_n, first + my_row + r * 8 + lane / 4, a.rows, d * 8 + lane % 4 * 2, a.width,
                 packed<T>(dn[d][r * 2], dn[d][r * 2 + 1]));
}

template <class T>
void start(const FfnStep& a, void* stream) {
  with_width(a.width, [&](auto width) {
    constexpr int D = decltype(width)::value;
    using K = NarrowBackward<D>;
    launch({ceil_div(a.rows, int64_t(K::kRows)), kFfnThreads, K::kShared, stream}, ffn_backward<T, D>, a);
  });
}

}  // namespace

void ffn_step_backward(const FfnStep& a, void* stream) {
  if (a.dtype == Dtype::bfloat16) start<bf16>(a, stream);
  else if (a.dtype == Dtype::float16) start<half>(a, stream);
  else throw std::runtime_error("ffn_step: 16 bits");
}

}  // namespace macaron_ops::cuda
