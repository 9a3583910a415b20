// A row's normalisation in float32, for a team that has it in registers: the formulas are in norm_rows.cu.
#pragma once

#include "rows.h"

namespace macaron_ops::cuda {

template <Norm N>
struct Standard {
  float mean = 0.f, rstd, share;

  // Of the rows s of a team, 0 past their end.
  template <class S>
  MACARON_DEVICE Standard(const float (&s)[S::kElements], int width, float eps, Team<S>& team, S) {
    if constexpr (N == Norm::layer) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) sum += s[i];
      mean = team.sum(sum) / float(width);
    }
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < S::kElements; ++i)
      if (team.has(i, width)) squares += (s[i] - mean) * (s[i] - mean);
    squares = team.sum(squares);
    if constexpr (N == Norm::sphere) {
      const float length = sqrtf(squares);
      rstd = 1.f / fmaxf(length, eps);
      share = length < eps ? 0.f : 1.f;
    } else {
      rstd = 1.f / sqrtf(squares / float(width) + eps);
      share = 1.f / float(width);
    }
  }
  MACARON_DEVICE float operator()(float s) const { return (s - mean) * rstd; }

  // s becomes N(s) weight + bias; of both no more than a vector is in registers at a time.
  template <class S>
  MACARON_DEVICE void apply(float (&s)[S::kElements], const float* weight, const float* bias, int width,
                            const Team<S>& team) const {
#pragma unroll
    for (int k = 0; k < S::CHUNKS; ++k) {
      float w[S::V], b[S::V];
      read_columns(w, k, weight, 1.f, width, team);
      read_columns(b, k, bias, 0.f, width, team);
#pragma unroll
      for (int v = 0; v < S::V; ++v) s[k * S::V + v] = (*this)(s[k * S::V + v]) * w[v] + b[v];
    }
  }
};

}  // namespace macaron_ops::cuda
