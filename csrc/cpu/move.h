// The step on the sphere, on panels of floats [width][kPanel] (lanes are rows):
//
//   y = S(x + step v(x, u)),    S(z) = z / max(|z|, eps)
//   v = u - <u, x> x  (tangent),    S(u) - x  (difference),    u  (ambient)
//
// Every sum is along lanes' own column, so that nothing is added across a vector.
#pragma once

#include "panel.h"

namespace macaron_ops::MACARON_OPS_ISA {

// -- rows to panels and back; narrow rows go element by element, where transposing vectors would move zeros ----------

constexpr int64_t kNarrow = kLanes / 2;

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

// Rows of `width` elements, `stride` apart.
template <class X>
static void panel_to_rows(const float* panel, int64_t count, int64_t width, int64_t stride, X* rows) {
  if (width > kNarrow)
    return panel_to_rows(panel, count, width, [&](int64_t i, int64_t c, Vec v, int64_t n) {
      store_part(rows + i * stride + c, v, n);
    });
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; ++c) rows[i * stride + c] = to<X>(panel[c * kPanel + i]);
}

// -- sums over the channels of one vector of lanes -------------------------------------------------------------------

// sum_c term(c), in four chains: shorter ones for the machine, smaller errors.
template <class Term>
MACARON_INLINE Vec sum_over(int64_t width, const Term& term) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 <= width; c += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += term(c + i);
  for (; c < width; ++c) sums[0] += term(c);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

MACARON_INLINE Vec dot(int64_t width, const float* a, const float* b) {
  return sum_over(width, [&](int64_t c) { return load(a + c * kPanel) * load(b + c * kPanel); });
}
MACARON_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// -- the step --------------------------------------------------------------------------------------------------------

// What the velocity of one vector of lanes needs besides x and u.
struct Velocity {
  Direction direction;
  Vec along;    // tangent: <u, x>
  Vec inverse;  // difference: 1 / max(|u|, eps)
  VecI longer;  // difference: |u| >= eps

  Velocity(const Move& move, int64_t width, const float* x, const float* u)
      : direction(move.direction), along{}, inverse{}, longer{} {
    if (direction == Direction::tangent) along = dot(width, u, x);
    if (direction == Direction::difference) {
      const Vec length = square_root(dot(width, u, u));
      longer = length >= move.eps;
      inverse = 1.f / at_least(length, broadcast(move.eps));
    }
  }
  Vec operator()(Vec x, Vec u) const {
    if (direction == Direction::tangent) return u - along * x;
    return direction == Direction::difference ? u * inverse - x : u;
  }
};

MACARON_INLINE float step_of(const Move& move, int64_t c) {
  return move.channel_step != nullptr ? move.channel_step[c] : move.step;
}

static void move_panel(const Move& move, int64_t width, int64_t count, const float* x, const float* u, float* y) {
  for (int64_t lane = 0; lane < count; lane += kLanes, x += kLanes, u += kLanes, y += kLanes) {
    const Velocity velocity(move, width, x, u);
    const Vec square = sum_over(width, [&](int64_t c) {
      const Vec at = load(x + c * kPanel);
      const Vec z = at + step_of(move, c) * velocity(at, load(u + c * kPanel));
      store(y + c * kPanel, z);
      return z * z;
    });
    const Vec inverse = 1.f / at_least(square_root(square), broadcast(move.eps));
    for (int64_t c = 0; c < width; ++c) store(y + c * kPanel, load(y + c * kPanel) * inverse);
  }
}

// Gradients in x and u. Those in the step are added to step_sums where it is not null: [width][kLanes] with a step per
// channel, else [kLanes]; they are the sum over its lanes.
static void move_backward_panel(const Move& move, int64_t width, int64_t count, const float* grad, const float* x,
                                const float* u, float* grad_x, float* grad_u, float* step_sums) {
  VecI lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  for (int64_t lane = 0; lane < count; lane += kLanes, grad += kLanes, x += kLanes, u += kLanes, grad_x += kLanes,
               grad_u += kLanes) {
    const Velocity velocity(move, width, x, u);
    const VecI there = lanes < int(count - lane);
    const Vec square = sum_over(width, [&](int64_t c) {
      const Vec at = load(x + c * kPanel);
      const Vec z = at + step_of(move, c) * velocity(at, load(u + c * kPanel));
      store(grad_x + c * kPanel, z);
      return z * z;
    });
    const Vec length = square_root(square), inverse = 1.f / at_least(length, broadcast(move.eps));
    // dz = (g - y <g, y>) / |z|; the second term is not there inside the ball of radius eps.
    Vec radial = dot(width, grad, grad_x) * inverse;
    radial = choose(length >= move.eps, radial, Vec{}) * inverse;
    Vec steps = {};
    const Vec along = sum_over(width, [&](int64_t c) {  // <dv, x> or <dv, S(u)>
      const Vec at = load(x + c * kPanel), to = load(u + c * kPanel);
      const Vec grad_z = (load(grad + c * kPanel) - load(grad_x + c * kPanel) * radial) * inverse;
      store(grad_x + c * kPanel, grad_z);
      const Vec grad_step = choose(there, grad_z * velocity(at, to), Vec{});
      if (step_sums != nullptr && move.channel_step != nullptr)
        store(step_sums + c * kLanes, load(step_sums + c * kLanes) + grad_step);
      else
        steps += grad_step;
      return step_of(move, c) * grad_z * (move.direction == Direction::difference ? to * velocity.inverse : at);
    });
    if (step_sums != nullptr && move.channel_step == nullptr) store(step_sums, load(step_sums) + steps);
    const Vec outside = choose(velocity.longer, along, Vec{});
    for (int64_t c = 0; c < width; ++c) {
      const Vec grad_z = load(grad_x + c * kPanel), grad_v = step_of(move, c) * grad_z;
      const Vec at = load(x + c * kPanel), to = load(u + c * kPanel);
      if (move.direction == Direction::tangent) {
        store(grad_x + c * kPanel, grad_z - along * to - velocity.along * grad_v);
        store(grad_u + c * kPanel, grad_v - along * at);
      } else if (move.direction == Direction::difference) {
        store(grad_x + c * kPanel, grad_z - grad_v);
        store(grad_u + c * kPanel, (grad_v - to * velocity.inverse * outside) * velocity.inverse);
      } else {
        store(grad_u + c * kPanel, grad_v);
      }
    }
  }
}

// -- gradients in the step: sums over rows, in an order that does not depend on the number of threads -----------------

constexpr int64_t kChunk = 8;  // panels whose terms are added in float, before their sum is added in double

class StepSums {
 public:
  StepSums(const Host& host, const Move& move, int64_t width, int64_t panels, float* grad_step)
      : grad_step_(grad_step),
        width_(grad_step == nullptr ? 0 : move.channel_step != nullptr ? width : 1),
        chunks_(ceil_div(panels, kChunk)),
        partial_(host, width_ * chunks_) {}

  int64_t chunks() const { return chunks_; }
  int64_t floats() const { return width_ * kLanes; }  // of the sums of one chunk
  void begin(float* sums) const { std::memset(sums, 0, size_t(floats()) * sizeof(float)); }
  void end(int64_t chunk, const float* sums) const {
    for (int64_t c = 0; c < width_; ++c) {
      double total = 0.0;
      for (int i = 0; i < kLanes; ++i) total += double(sums[c * kLanes + i]);
      partial_[chunk * width_ + c] = total;
    }
  }
  void finish() const {
    for (int64_t c = 0; c < width_; ++c) {
      double total = 0.0;
      for (int64_t i = 0; i < chunks_; ++i) total += partial_[i * width_ + c];
      grad_step_[c] = float(total);
    }
  }

 private:
  float* grad_step_;
  int64_t width_, chunks_;
  Buffer<double> partial_;
};

}  // namespace macaron_ops::MACARON_OPS_ISA
