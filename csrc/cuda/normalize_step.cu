// normalize_step, forward and backward: y = S(x + c v), v by the direction; see step.h for the formulas.
//
// Forward reads x and u and writes y, backward reads g, x and u and writes dx and du, each once: about 3 FLOP a byte, so
// that memory is the limit. A gradient of c is summed over the rows that a block meets, then by torch over the blocks: no
// atomics, the same bits every time.
#include "step.h"

namespace macaron_ops::cuda {
namespace {

template <class S, Direction D, bool CHANNELS>
__global__ void __launch_bounds__(S::kMostThreads) step_forward(NormalizeStep a, int team_size) {
  using T = typename S::Type;
  Team<S> team = team_of<S>(team_size, shared_memory<float>());
  const int width = a.width;
  each_row<S>(a.rows, team_size, [&](int64_t row, bool inside) {
    Elements<S> x, u;
    x.load(static_cast<const T*>(a.x) + row * width, width, team, inside);
    u.load(static_cast<const T*>(a.u) + row * width, width, team, inside);
    const auto c = steps_of<S, CHANNELS>(a.step, width, team);
    const Velocity<D> velocity(x, u, a.step.eps, team);
    float z[S::kElements], squares = 0.f;
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
      z[i] = x[i] + c[i] * velocity(x[i], u[i]);
      squares += z[i] * z[i];
    }
    const float inverse = 1.f / fmaxf(sqrtf(team.sum(squares)), a.step.eps);
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) z[i] *= inverse;
    x.set(z);
    x.store(static_cast<T*>(a.y) + row * width, width, team, inside);
  });
}

template <class S, bool CHANNELS>  // c of each of 32 elements takes registers too
constexpr int kFewest = CHANNELS && S::kElements > 16 ? 2 : S::kFewestBackward;

template <class S, Direction D, bool CHANNELS>
__global__ void __launch_bounds__(S::kMostThreads, kFewest<S, CHANNELS>) step_backward(NormalizeStep a, int team_size) {
  using T = typename S::Type;
  float* shared = shared_memory<float>();
  Team<S> team = team_of<S>(team_size, shared);
  const ColumnSums<S> sums{shared + kScratchFloats};
  const int width = a.width;
  const auto c = steps_of<S, CHANNELS>(a.step, width, team);
  if (CHANNELS && a.partial != nullptr) sums.clear();
  float sum = 0.f;
  each_row<S>(a.rows, team_size, [&](int64_t row, bool inside) {
    Elements<S> g, x, u;
    g.load(static_cast<const T*>(a.grad) + row * width, width, team, inside);
    x.load(static_cast<const T*>(a.x) + row * width, width, team, inside);
    u.load(static_cast<const T*>(a.u) + row * width, width, team, inside);
    const Velocity<D> velocity(x, u, a.step.eps, team);
    float z[S::kElements], of_z[2] = {0.f, 0.f};  // <z, z>, <g, z>
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
      z[i] = x[i] + c[i] * velocity(x[i], u[i]);
      of_z[0] += z[i] * z[i];
      of_z[1] += g[i] * z[i];
    }
    team.sum(of_z);
    const float norm = sqrtf(of_z[0]), inverse = 1.f / fmaxf(norm, a.step.eps);
    const float radial = norm >= a.step.eps ? of_z[1] * inverse * inverse : 0.f;
    float back = 0.f;  // <dv, x>, for "difference" <dv, u>
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
      z[i] = (g[i] - z[i] * radial) * inverse;  // dz from here on
      const float dv = c[i] * z[i];
      back += dv * (velocity.kDifference ? u[i] : x[i]);
      if (a.partial != nullptr) {
        const float dc = inside && team.has(i, width) ? z[i] * velocity(x[i], u[i]) : 0.f;
        if constexpr (CHANNELS) sums.add(i, dc);
        else sum += dc;
      }
    }
    if constexpr (D != Direction::ambient) back = team.sum(back);
    const float ux = velocity.along, u_radial = velocity.inside ? 0.f : back * ux * ux;
    float du[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
      const float dz = z[i], dv = c[i] * dz;
      du[i] = dv;
      if constexpr (D == Direction::tangent) {
        z[i] = dz - back * u[i] - ux * dv;  // dx from here on
        du[i] = dv - back * x[i];
      } else if constexpr (D == Direction::difference) {
        z[i] = dz - dv;
        du[i] = (dv - u[i] * u_radial) * ux;
      }
    }
    x.set(z);
    u.set(du);
    if (a.grad_x != nullptr) x.store(static_cast<T*>(a.grad_x) + row * width, width, team, inside);
    if (a.grad_u != nullptr) u.store(static_cast<T*>(a.grad_u) + row * width, width, team, inside);
  });
  if (a.partial == nullptr) return;
  if constexpr (!CHANNELS) {
    sum = team.sum(sum);
    if (team.lane == 0) sums.sums[threadIdx.x / team.size] = sum;
  }
  __syncthreads();
  if constexpr (CHANNELS) {
    sums.store(a.partial, width, team_size);
  } else if (threadIdx.x == 0) {
    float total = 0.f;
    for (int t = 0; t < int(blockDim.x) / team.size; ++t) total += sums.sums[t];
    a.partial[blockIdx.x] = total;
  }
}

template <class Work>
void with_plan(const NormalizeStep& a, const Work& work) {
  const RowPlan rows = row_plan(a.width, a.dtype);
  with_shape(a.dtype, rows, [&](auto shape) {
    with_direction(a.step.direction, [&](auto direction) {
      if (a.step.per_channel) work(rows, shape, direction, std::true_type{});
      else work(rows, shape, direction, std::false_type{});
    });
  });
}

// work(launch, kernel, team) for the backward pass, with the gradient of c or without.
template <class Work>
void with_backward(const NormalizeStep& a, bool summed, void* stream, const Work& work) {
  with_plan(a, [&](const RowPlan& rows, auto shape, auto direction, auto channels) {
    using S = decltype(shape);
    const size_t sums = summed ? size_t(rows.threads) * (channels ? S::kElements : 1) : 0;
    work(launch_of(rows, a.rows, kScratchFloats + sums, stream),
         step_backward<S, decltype(direction)::value, decltype(channels)::value>, rows.team);
  });
}

}  // namespace

int64_t normalize_step_blocks(const NormalizeStep& a) {
  int64_t blocks = 0;
  with_backward(a, true, nullptr, [&](const Launch& l, auto kernel, int) { blocks = blocks_that_sum(l, kernel); });
  return blocks;
}

void normalize_step_forward(const NormalizeStep& a, void* stream) {
  with_plan(a, [&](const RowPlan& rows, auto shape, auto direction, auto channels) {
    launch(launch_of(rows, a.rows, kScratchFloats, stream),
           step_forward<decltype(shape), decltype(direction)::value, decltype(channels)::value>, a, rows.team);
  });
}

void normalize_step_backward(const NormalizeStep& a, void* stream) {
  with_backward(a, a.partial != nullptr, stream, [&](Launch l, auto kernel, int team) {
    if (a.partial != nullptr) l.blocks = a.blocks;
    launch(l, kernel, a, team);
  });
}

}  // namespace macaron_ops::cuda
