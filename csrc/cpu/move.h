// The step on the sphere, on rows:
//
//   y = S(x + step v(x, u)),    S(z) = z / max(|z|, eps)
//   v = u - <u, x> x  (tangent),    S(u) - x  (difference),    u  (ambient)
//
// Rows are read three or four times from the first cache rather than kept. Wide ones go one by one, with channels in
// lanes. Narrow ones go side by side, with rows in lanes, and in double: their sums are short, and the roundings between
// them would be most of the error.
#pragma once

#include "panel.h"
#include "wide.h"

namespace macaron_ops::MACARON_OPS_ISA {

// -- rows to panels and back; narrow rows go element by element, where transposing vectors would move zeros ----------

constexpr int64_t kNarrow = 8;

// Lanes beyond the last row, and channels from `width` to `padded`, are zeros.
template <class X>
static void rows_to_panel(const X* rows, int64_t count, int64_t width, int64_t padded, float* panel) {
  if (width > kNarrow) {
    fill_panel<float>(count, width, panel, nullptr, 0, 0,
                      [&](int64_t i, int64_t c, int64_t n) { return load_part(rows + i * width + c, n); });
  } else {
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < kPanel; ++i) panel[c * kPanel + i] = i < count ? to_float(rows[i * width + c]) : 0.f;
  }
  for (int64_t c = width * kPanel; c < padded * kPanel; ++c) panel[c] = 0.f;
}
template <class X>
static void rows_of_panel(const float* panel, int64_t count, int64_t width, X* rows) {
  if (width > kNarrow)
    return panel_to_rows(panel, count, width, [&](int64_t i, int64_t c, Vec v, int64_t n) {
      store_part(rows + i * width + c, v, n);
    });
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; ++c) rows[i * width + c] = to<X>(panel[c * kPanel + i]);
}

// -- the two layouts: `steps` vectors make up one row, or kLanes rows ------------------------------------------------

MACARON_INLINE Vec where_at_least(Vec a, Vec b, Vec yes, Vec no) { return choose(a >= b, yes, no); }

struct ChannelsInLanes {
  using Number = Vec;
  int64_t width, steps;

  explicit ChannelsInLanes(int64_t width) : width(width), steps(ceil_div(width, kLanes)) {}
  static Vec constant(float value) { return broadcast(value); }
  template <class T>
  Vec load(const T* row, int64_t i) const { return load_part(row + i * kLanes, width - i * kLanes); }
  template <class T>
  void store(T* row, int64_t i, Vec v) const { store_part(row + i * kLanes, v, width - i * kLanes); }
  Vec step(const Move& move, int64_t i) const {
    return move.channel_step != nullptr ? load(move.channel_step, i) : broadcast(move.step);
  }
  Vec total(Vec lanes) const { return broadcast(sum(lanes)); }
  // Never fused with a sum: each pass over a row forms z anew, and where little is left of it any other rounding than
  // that of the last pass would be an error of its length.
  static Vec product(Vec a, Vec b) { return rounded(a * b); }
  Wide term(Vec v) const { return widened(v); }
};

struct RowsInLanes {
  using Number = Wide;
  int64_t width, steps;
  Wide there;  // 1 in lanes that hold a row, else 0

  RowsInLanes(int64_t width, int64_t count) : width(width), steps(width) {
    for (int i = 0; i < kHalf; ++i) {
      there.low[i] = i < count;
      there.high[i] = i + kHalf < count;
    }
  }
  static Wide constant(double value) { return broadcast_wide(value); }
  Wide load(const float* lanes, int64_t i) const { return widened(MACARON_OPS_ISA::load(lanes + i * kPanel)); }
  void store(float* lanes, int64_t i, Wide w) const { MACARON_OPS_ISA::store(lanes + i * kPanel, narrowed(w)); }
  Wide step(const Move& move, int64_t i) const {
    return constant(move.channel_step != nullptr ? move.channel_step[i] : move.step);
  }
  Wide total(Wide lanes) const { return lanes; }
  static Wide product(Wide a, Wide b) { return a * b; }
  Wide term(Wide w) const { return where_at_least(there, constant(1.0), w, constant(0.0)); }
};

// sum_c term(c)
template <class Layout, class Term>
MACARON_INLINE typename Layout::Number sum_over(const Layout& layout, const Term& term) {
  auto total = Layout::constant(0.f);
  for (int64_t i = 0; i < layout.steps; ++i) total = total + term(i);
  return layout.total(total);
}
// max(|z|, eps) of |z|^2, which stays NaN where it is.
template <class Number>
MACARON_INLINE Number clamped(Number length, Number eps) { return where_at_least(eps, length, eps, length); }

// What S scales the part of a gradient with that turns z: 1 / max(|z|, eps). The only channel of a row cannot turn, and
// the rounding that is left of its gradient has to become 0.
template <class Layout, class Number>
MACARON_INLINE Number turning(const Layout& layout, Number length, Number eps, Number inverse) {
  return layout.width == 1 ? where_at_least(length, eps, Layout::constant(0.f), inverse) : inverse;
}

// -- the step --------------------------------------------------------------------------------------------------------

// z = x + step v, vector by vector.
template <Direction direction, class Layout, class X, class U>
struct Moved {
  using Number = typename Layout::Number;

  const Layout& layout;
  const Move& move;
  const X* x;
  const U* u;
  Number along;                 // tangent: <u, x>
  Number inverse, outer, turn;  // difference: 1 / max(|u|, eps), and the same where |u| >= eps, else 0; turning of u

  Moved(const Layout& layout, const Move& move, const X* x, const U* u) : layout(layout), move(move), x(x), u(u) {
    along = inverse = outer = turn = Layout::constant(0.f);
    if constexpr (direction == Direction::tangent)
      along = sum_over(layout, [&](int64_t i) { return layout.load(u, i) * layout.load(x, i); });
    if constexpr (direction == Direction::difference) {
      const Number square = sum_over(layout, [&](int64_t i) { return layout.load(u, i) * layout.load(u, i); });
      const Number length = square_root(square), eps = Layout::constant(move.eps);
      inverse = Layout::constant(1.f) / clamped(length, eps);
      outer = where_at_least(length, eps, inverse, outer);
      turn = turning(layout, length, eps, inverse);
    }
  }
  Number velocity(int64_t i) const {
    const Number to = layout.load(u, i);
    if constexpr (direction == Direction::tangent) return to - Layout::product(along, layout.load(x, i));
    if constexpr (direction == Direction::difference) return Layout::product(to, inverse) - layout.load(x, i);
    return to;
  }
  Number operator()(int64_t i) const { return layout.load(x, i) + Layout::product(layout.step(move, i), velocity(i)); }
};

template <Direction direction, class Layout, class X, class U, class Y>
static void move_in(const Layout& layout, const Move& move, const X* x, const U* u, Y* y) {
  const Moved<direction, Layout, X, U> z(layout, move, x, u);
  const auto square = sum_over(layout, [&](int64_t i) { return z(i) * z(i); });
  const auto length = clamped(square_root(square), Layout::constant(move.eps));
  for (int64_t i = 0; i < layout.steps; ++i) layout.store(y, i, z(i) / length);
}

// With dz = (dy - y <dy, y>) / |z|, the second term not inside the ball of radius eps, and dv = step dz:
//   tangent      dx = dz - <dv, x> u - <u, x> dv    du = dv - <dv, x> x
//   difference   dx = dz - dv                       du = (dv - S(u) <dv, S(u)>) / |u|, likewise
//   ambient      dx = dz                            du = dv
// The terms dz v of the gradient in step are added to `steps`, by vector with a step per channel.
template <Direction direction, class Layout, class G, class X, class U, class GX, class GU>
static void move_backward_in(const Layout& layout, const Move& move, const G* grad, const X* x, const U* u,
                             GX* grad_x, GU* grad_u, double* steps) {
  using Number = typename Layout::Number;
  const Moved<direction, Layout, X, U> z(layout, move, x, u);
  const Number zero = Layout::constant(0.f);
  Number square = zero, along_z = zero;
  for (int64_t i = 0; i < layout.steps; ++i) {
    const Number at = z(i);
    square = square + at * at;
    along_z = along_z + layout.load(grad, i) * at;
  }
  square = layout.total(square);
  along_z = layout.total(along_z);
  const Number length = square_root(square), eps = Layout::constant(move.eps);
  const Number inverse = Layout::constant(1.f) / clamped(length, eps);
  const Number radial = where_at_least(length, eps, along_z * inverse * inverse, zero);
  const Number turn = turning(layout, length, eps, inverse);
  const auto grad_z = [&](int64_t i) { return (layout.load(grad, i) - z(i) * radial) * turn; };
  const auto grad_v = [&](int64_t i) { return layout.step(move, i) * grad_z(i); };
  if (steps != nullptr)
    for (int64_t i = 0; i < layout.steps; ++i) {
      double* to = steps + (move.channel_step != nullptr ? i * kLanes : 0);
      store_wide(to, load_wide(to) + layout.term(grad_z(i) * z.velocity(i)));
    }
  Number along = zero;  // <dv, x>, or <dv, S(u)> / |u|
  if constexpr (direction == Direction::tangent)
    along = sum_over(layout, [&](int64_t i) { return grad_v(i) * layout.load(x, i); });
  if constexpr (direction == Direction::difference)
    along = sum_over(layout, [&](int64_t i) { return grad_v(i) * layout.load(u, i); }) * z.outer * z.inverse;
  for (int64_t i = 0; i < layout.steps; ++i) {
    const Number d_z = grad_z(i), d_v = layout.step(move, i) * d_z;
    Number d_x = d_z, d_u = d_v;
    if constexpr (direction == Direction::tangent) {
      d_x = d_z - along * layout.load(u, i) - z.along * d_v;
      d_u = d_v - along * layout.load(x, i);
    }
    if constexpr (direction == Direction::difference) {
      d_x = d_z - d_v;
      d_u = (d_v - along * layout.load(u, i)) * z.turn;
    }
    if (grad_x != nullptr) layout.store(grad_x, i, d_x);
    if (grad_u != nullptr) layout.store(grad_u, i, d_u);
  }
}

template <Direction direction>
struct DirectionIs {
  static constexpr Direction value = direction;
};
template <class Function>
static void with_direction(Direction direction, const Function& function) {
  if (direction == Direction::tangent) function(DirectionIs<Direction::tangent>{});
  else if (direction == Direction::difference) function(DirectionIs<Direction::difference>{});
  else function(DirectionIs<Direction::ambient>{});
}

// At most kPanel rows.
template <class X, class U, class Y>
static void move_rows(const Move& move, int64_t width, int64_t count, const X* x, const U* u, Y* y) {
  with_direction(move.direction, [&](auto direction) {
    if (width > kNarrow) {
      const ChannelsInLanes layout(width);
      for (int64_t i = 0; i < count; ++i)
        move_in<direction.value>(layout, move, x + i * width, u + i * width, y + i * width);
      return;
    }
    float panels[3][kNarrow * kPanel];
    rows_to_panel(x, count, width, width, panels[0]);
    rows_to_panel(u, count, width, width, panels[1]);
    for (int64_t lane = 0; lane < count; lane += kLanes)
      move_in<direction.value>(RowsInLanes(width, count - lane), move, panels[0] + lane, panels[1] + lane,
                               panels[2] + lane);
    rows_of_panel(panels[2], count, width, y);
  });
}

template <class G, class X, class U, class GX, class GU>
static void move_rows_backward(const Move& move, int64_t width, int64_t count, const G* grad, const X* x, const U* u,
                               GX* grad_x, GU* grad_u, double* steps) {
  with_direction(move.direction, [&](auto direction) {
    if (width > kNarrow) {
      const ChannelsInLanes layout(width);
      for (int64_t i = 0; i < count * width; i += width)
        move_backward_in<direction.value>(layout, move, grad + i, x + i, u + i, grad_x != nullptr ? grad_x + i : nullptr,
                                          grad_u != nullptr ? grad_u + i : nullptr, steps);
      return;
    }
    float panels[5][kNarrow * kPanel];
    rows_to_panel(grad, count, width, width, panels[0]);
    rows_to_panel(x, count, width, width, panels[1]);
    rows_to_panel(u, count, width, width, panels[2]);
    for (int64_t lane = 0; lane < count; lane += kLanes)
      move_backward_in<direction.value>(RowsInLanes(width, count - lane), move, panels[0] + lane, panels[1] + lane,
                                        panels[2] + lane, panels[3] + lane, panels[4] + lane, steps);
    if (grad_x != nullptr) rows_of_panel(panels[3], count, width, grad_x);
    if (grad_u != nullptr) rows_of_panel(panels[4], count, width, grad_u);
  });
}

// -- gradients in the step: sums over rows, in an order that does not depend on the number of threads -----------------

class StepSums {
 public:
  static constexpr int64_t kChunk = 8;  // panels of rows whose terms are added into the same sums

  StepSums(const Host& host, const Move& move, int64_t width, int64_t panels, float* grad_step)
      : grad_step_(grad_step),
        count_(grad_step == nullptr ? 0 : move.channel_step != nullptr ? width : 1),
        lanes_(move.channel_step != nullptr && width > kNarrow ? 1 : kLanes),
        chunks_(ceil_div(panels, kChunk)),
        partial_(host, count_ * chunks_) {}

  int64_t chunks() const { return chunks_; }
  int64_t doubles() const { return round_up(count_ * lanes_, kLanes); }  // of the sums of one chunk
  void begin(double* sums) const {
    for (int64_t i = 0; i < doubles(); ++i) sums[i] = 0.0;
  }
  void end(int64_t chunk, const double* sums) const {
    for (int64_t c = 0; c < count_; ++c) {
      double total = 0.0;
      for (int64_t i = 0; i < lanes_; ++i) total += sums[c * lanes_ + i];
      partial_[chunk * count_ + c] = total;
    }
  }
  void finish() const {
    for (int64_t c = 0; c < count_; ++c) {
      double total = 0.0;
      for (int64_t i = 0; i < chunks_; ++i) total += partial_[i * count_ + c];
      grad_step_[c] = float(total);
    }
  }

 private:
  float* grad_step_;
  int64_t count_, lanes_, chunks_;
  Buffer<double> partial_;
};

}  // namespace macaron_ops::MACARON_OPS_ISA
