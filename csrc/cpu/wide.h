// As many doubles as a Vec has floats, for the few sums whose rounding to float32 would be an operator's largest error.
#pragma once

#include "math.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int kHalf = kLanes / 2;
typedef double Doubles __attribute__((vector_size(8 * kHalf)));
typedef float HalfVec __attribute__((vector_size(4 * kHalf)));

struct Wide {
  Doubles low, high;
};

MACARON_INLINE Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
MACARON_INLINE Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
MACARON_INLINE Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
MACARON_INLINE Wide operator/(Wide a, Wide b) { return {a.low / b.low, a.high / b.high}; }

MACARON_INLINE Wide broadcast_wide(double x) { return {x - Doubles{}, x - Doubles{}}; }
template <size_t... i>
MACARON_INLINE Wide widened(Vec v, IndexSequence<i...>) {
  return {__builtin_convertvector(__builtin_shufflevector(v, v, int(i)...), Doubles),
          __builtin_convertvector(__builtin_shufflevector(v, v, int(i) + kHalf...), Doubles)};
}
MACARON_INLINE Wide widened(Vec v) { return widened(v, MakeIndexSequence<kHalf>{}); }
template <size_t... i>
MACARON_INLINE Vec narrowed(Wide w, IndexSequence<i...>) {
  return __builtin_shufflevector(__builtin_convertvector(w.low, HalfVec), __builtin_convertvector(w.high, HalfVec),
                                 int(i)...);
}
MACARON_INLINE Vec narrowed(Wide w) { return narrowed(w, MakeIndexSequence<kLanes>{}); }

// `yes` where a >= b, else `no`.
MACARON_INLINE Wide where_at_least(Wide a, Wide b, Wide yes, Wide no) {
  return {a.low >= b.low ? yes.low : no.low, a.high >= b.high ? yes.high : no.high};
}
MACARON_INLINE Wide square_root(Wide x) { return {square_root(x.low), square_root(x.high)}; }
MACARON_INLINE double sum(Wide x) {
  const Doubles both = x.low + x.high;
  double s = 0.0;
  for (int i = 0; i < kHalf; ++i) s += both[i];
  return s;
}

MACARON_INLINE Wide load_wide(const double* p) {
  Wide w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
MACARON_INLINE void store_wide(double* p, Wide w) { std::memcpy(p, &w, sizeof w); }

}  // namespace macaron_ops::MACARON_OPS_ISA
