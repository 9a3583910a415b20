// A step on the unit sphere, y = S(x + c v) with S(z) = z / max(|z|, eps): one row's formulas in float32, for a team that
// has x and u in registers. The formulas of the backward pass are in kernels/normalize_step.py.
#pragma once

#include <type_traits>

#include "rows.h"

namespace macaron_ops::cuda {

// c where it is one number.
MACARON_DEVICE float step_of_all(const Step& step) { return step.tensor == nullptr ? step.number : step.tensor[0]; }
// c of a column, 0 past the row's end.
MACARON_DEVICE float step_at(const Step& step, int column, int width) {
  if (!step.per_channel) return step_of_all(step);
  return column < width ? step.tensor[column] : 0.f;
}
// c of a thread's elements.
template <class S, bool CHANNELS>
MACARON_DEVICE auto steps_of(const Step& step, int width, const Team<S>& team) {
  if constexpr (CHANNELS) {
    return Columns<S>(step.tensor, 0.f, width, team);
  } else {
    struct {
      float all;
      MACARON_DEVICE float operator[](int) const { return all; }
    } same = {step_of_all(step)};
    return same;
  }
}

// What v of a row's elements is computed with.
template <Direction D>
struct Velocity {
  static constexpr bool kDifference = D == Direction::difference;
  float along = 0.f;    // <u, x>; for "difference" 1 / max(|u|, eps)
  bool inside = false;  // "difference": |u| < eps

  template <class S>
  MACARON_DEVICE Velocity(const Elements<S>& x, const Elements<S>& u, float eps, Team<S>& team) {
    if constexpr (D != Direction::ambient) {
      float part = 0.f;
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) part += u[i] * (kDifference ? u[i] : x[i]);
      along = team.sum(part);
      if constexpr (kDifference) {
        const float length = sqrtf(along);
        inside = length < eps;
        along = 1.f / fmaxf(length, eps);
      }
    }
  }
  MACARON_DEVICE float operator()(float x, float u) const {
    if constexpr (D == Direction::tangent) return u - along * x;
    if constexpr (kDifference) return u * along - x;
    return u;
  }
};

// work(std::integral_constant<Direction, ...>{}) for a direction.
template <class Work>
void with_direction(Direction direction, const Work& work) {
  if (direction == Direction::tangent) work(std::integral_constant<Direction, Direction::tangent>{});
  else if (direction == Direction::difference) work(std::integral_constant<Direction, Direction::difference>{});
  else work(std::integral_constant<Direction, Direction::ambient>{});
}

}  // namespace macaron_ops::cuda
