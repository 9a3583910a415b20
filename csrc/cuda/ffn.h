// What the kernels of ffn_step share: both weights pass by a block, kHidden hidden channels at a time, which keeps its rows
// as operands in shared memory.
//
// Rows of shared memory are 16-byte chunks in an order that depends on the row, so that the eight rows that an
// instruction reads lie in different banks.
#pragma once

#include <type_traits>

#include "activation.h"
#include "matrix.h"
#include "norm.h"

namespace macaron_ops::cuda {

constexpr int kFfnThreads = 128, kFfnWarps = kFfnThreads / kWarp;
constexpr int kHidden = 32;  // hidden channels at a time

// Where 16-byte chunk c of a row lies. Rows of D channels, or of kHidden, two of which share 128 bytes.
template <class T, int D>
MACARON_DEVICE T* wide_chunk(T* rows, int row, int c) {
  return rows + row * D + (c ^ (row & 7)) * 8;
}
template <class T>
MACARON_DEVICE T* hidden_chunk(T* rows, int row, int c) {
  return rows + row * kHidden + (c ^ (row >> 1 & 3)) * 8;
}

// Starts the copies of hidden channels `first` ... `first + kHidden - 1` of both weights; zeros past the edges.
template <class T, int D>
MACARON_DEVICE void copy_weights(const FfnStep& a, int first, T* in, T* out) {
  const T *w_in = static_cast<const T*>(a.w_in), *w_out = static_cast<const T*>(a.w_out);
  constexpr int kChunks = D / 8;
  for (int i = int(threadIdx.x); i < kHidden * kChunks; i += kFfnThreads) {
    const int row = i / kChunks, c = i % kChunks;
    const bool inside = first + row < a.hidden && c * 8 < a.width;
    copy_async(wide_chunk<T, D>(in, row, c), inside ? w_in + int64_t(first + row) * a.width + c * 8 : w_in, inside);
  }
  for (int i = int(threadIdx.x); i < D * (kHidden / 8); i += kFfnThreads) {
    const int row = i / (kHidden / 8), c = i % (kHidden / 8);
    const bool inside = row < a.width && first + c * 8 < a.hidden;
    copy_async(hidden_chunk(out, row, c), inside ? w_out + int64_t(row) * a.hidden + first + c * 8 : w_out, inside);
  }
}

MACARON_DEVICE float at(const float* bias, int column, int width) {
  return bias != nullptr && column < width ? bias[column] : 0.f;
}

template <Norm N, class S>
MACARON_DEVICE void normalise(const FfnStep& a, Elements<S>& x, Team<S>& team) {
  float s[S::kElements];
#pragma unroll
  for (int i = 0; i < S::kElements; ++i) s[i] = x[i];
  const Standard<N> standard(s, a.width, a.eps, team, S{});
  standard.apply(s, a.norm_weight, a.norm_bias, a.width, team);
#pragma unroll
  for (int i = 0; i < S::kElements; ++i) s[i] = team.has(i, a.width) ? s[i] : 0.f;
  x.set(s);
}

// The warp's share of a block's `count` rows of a tensor, from `first` on, as an operand: N of them or themselves; zeros
// past the last row and channel.
template <class T, int D>
MACARON_DEVICE void write_rows(const FfnStep& a, const T* tensor, int64_t first, T* rows, int count, bool normalised) {
  using S = Shape<T, 8, 1, false>;
  constexpr int kTeam = D / 8, kTogether = kWarp / kTeam;
  const int lane = int(threadIdx.x) % kWarp, mine = count / kFfnWarps, begin = int(threadIdx.x) / kWarp * mine;
  Team<S> team{kTeam, lane % kTeam, nullptr};
#pragma unroll 1
  for (int i = begin; i < begin + mine; i += kTogether) {
    const int row = i + lane / kTeam;
    Elements<S> x;
    x.load(tensor + (first + row) * a.width, a.width, team, first + row < a.rows);
    if (normalised && a.normalised) {
      if (a.norm == Norm::layer) normalise<Norm::layer>(a, x, team);
      else if (a.norm == Norm::rms) normalise<Norm::rms>(a, x, team);
      else normalise<Norm::sphere>(a, x, team);
    }
    *reinterpret_cast<Vector<T, 8>*>(wide_chunk<T, D>(rows, row, team.lane)) = x.chunks[0];
  }
}

// work(std::integral_constant<int, D>{}) for a width.
template <class Work>
void with_width(int width, const Work& work) {
  if (width <= 64) work(std::integral_constant<int, 64>{});
  else if (width <= 128) work(std::integral_constant<int, 128>{});
  else work(std::integral_constant<int, 256>{});
}

}  // namespace macaron_ops::cuda
