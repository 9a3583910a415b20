// ffn_step where x is narrow (D <= 256, 16 bits), forward, in one kernel: y = a x + c (W_out act(W_in N(x) + b_in) + b_out).
//
// A block keeps its rows of N(x) in shared memory and of y in registers, while both weights pass by, kHidden hidden
// channels at a time, copied (cp.async) while the ones before are multiplied (mma.sync). Accumulators of the first
// product become, activated and rounded, operands of the second in the registers where they are: the hidden
// activations, 2 M F numbers, never leave the processor. 4 M D F FLOP; x and y move once, the weights once a block, from
// L2: kRows FLOP a byte of them.
#include "ffn.h"

namespace macaron_ops::cuda {
namespace {

template <int D>
struct Narrow {
  static constexpr int kTiles = D <= 128 ? 2 : 1;  // of 16 rows, a warp: as many as registers have room for
  static constexpr int kRows = kFfnWarps * kTiles * 16;
  static constexpr int kRowsOf = kRows * D, kWeight = kHidden * D;  // elements
  static constexpr size_t kShared = size_t(kRowsOf + 4 * kWeight) * 2;
};

template <class T, int D>
__global__ void __launch_bounds__(kFfnThreads) ffn_forward(FfnStep a) {
  using K = Narrow<D>;
  T* rows = shared_memory<T>();
  T* weights = rows + K::kRowsOf;  // two stages of (w_in, w_out)
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t first = int64_t(blockIdx.x) * K::kRows;
  const int steps = ceil_div(a.hidden, kHidden);
  const auto stage = [&](int i) { return weights + i % 2 * 2 * K::kWeight; };

  copy_weights<T, D>(a, 0, stage(0), stage(0) + K::kWeight);
  copies_commit();
  write_rows<T, D>(a, static_cast<const T*>(a.x), first, rows, K::kRows, true);

  float y[K::kTiles][D / 8][4] = {};
  const int my_row = warp * K::kTiles * 16;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy_weights<T, D>(a, (step + 1) * kHidden, stage(step + 1), stage(step + 1) + K::kWeight);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    T *w_in = stage(step), *w_out = w_in + K::kWeight;

    float h[K::kTiles][kHidden / 8][4] = {};
#pragma unroll 2
    for (int k = 0; k < D / 16; ++k) {
      Fragment n[K::kTiles], w[kHidden / 16];
#pragma unroll
      for (int m = 0; m < K::kTiles; ++m)
        load_matrices(n[m], wide_chunk<T, D>(rows, my_row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int f = 0; f < kHidden / 16; ++f)
        load_matrices(w[f], wide_chunk<T, D>(w_in, f * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < K::kTiles; ++m)
#pragma unroll
        for (int f = 0; f < kHidden / 8; ++f)
          multiply_add<T>(h[m][f], n[m], w[f / 2].at[f % 2 * 2], w[f / 2].at[f % 2 * 2 + 1]);
    }

    Fragment hidden[K::kTiles][kHidden / 16];
#pragma unroll
    for (int f = 0; f < kHidden / 8; ++f) {
      const int column = step * kHidden + f * 8 + lane % 4 * 2;
      const float b0 = at(a.b_in, column, a.hidden), b1 = at(a.b_in, column + 1, a.hidden);
#pragma unroll
      for (int m = 0; m < K::kTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          hidden[m][f / 2].at[f % 2 * 2 + r] =
              packed<T>(activate(h[m][f][r * 2] + b0, a.activation), activate(h[m][f][r * 2 + 1] + b1, a.activation));
    }

#pragma unroll
    for (int k = 0; k < kHidden / 16; ++k)
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        Fragment w;
        load_matrices(w, hidden_chunk(w_out, d * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < K::kTiles; ++m) {
          multiply_add<T>(y[m][d * 2], hidden[m][k], w.at[0], w.at[1]);
          multiply_add<T>(y[m][d * 2 + 1], hidden[m][k], w.at[2], w.at[3]);
        }
      }
    __syncthreads();  // the next copies overwrite this stage
  }

#pragma unroll
  for (int m = 0; m < K::kTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + my_row + m * 16 + r * 8 + lane / 4;
      if (row >= a.rows) continue;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const int column = d * 8 + lane % 4 * 2;
        if (column >= a.width) continue;
        const Vector<T, 2> x = *reinterpret_cast<const Vector<T, 2>*>(static_cast<const T*>(a.x) + row * a.width + column);
        float out[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          out[i] = a.a * x[i] + a.c * (y[m][d][r * 2 + i] + at(a.b_out, column + i, a.width));
        *reinterpret_cast<uint32_t*>(static_cast<T*>(a.y) + row * a.width + column) = packed<T>(out[0], out[1]);
      }
    }
}

template <class T>
void start(const FfnStep& a, void* stream) {
  with_width(a.width, [&](auto width) {
    constexpr int D = decltype(width)::value;
    launch({ceil_div(a.rows, int64_t(Narrow<D>::kRows)), kFfnThreads, Narrow<D>::kShared, stream}, ffn_forward<T, D>, a);
  });
}

}  // namespace

void ffn_step_forward(const FfnStep& a, void* stream) {
  if (a.dtype == Dtype::bfloat16) start<bf16>(a, stream);
  else if (a.dtype == Dtype::float16) start<half>(a, stream);
  else throw std::runtime_error("ffn_step: 16 bits");
}

}  // namespace macaron_ops::cuda
