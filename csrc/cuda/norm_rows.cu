// Normalised rows, n = N(s) weight + bias with s = a x + c z, and their gradients: what stands around the products of a
// substep, whose residual sum is s. N is layer, rms or sphere (macaron_ops/reference/norm.py).
//
//   y = (s - mean) rstd        the mean is 0 but for layer; rstd = 1 / sqrt(mean((s - mean)^2) + eps), or 1 / max(|s|, eps)
//   ds = rstd (g - mean(g) - y <g, y> share) + a residual,    g = grad weight, share = 1/D, for sphere 1 (0 where |s| < eps)
//
// Squares are summed of centred rows, which stay in registers: a large mean costs no digits. Each tensor is read and
// written once; memory is the limit. Gradients of weight and bias are sums over rows, see ColumnSums.
#include <type_traits>

#include "norm.h"

namespace macaron_ops::cuda {
namespace {

template <class S, Norm N>
__global__ void __launch_bounds__(S::kMostThreads, S::kFewestForward) norm_forward(NormRows a, int team_size) {
  using T = typename S::Type;
  Team<S> team = team_of<S>(team_size, shared_memory<float>());
  const int width = a.width;
  each_row<S>(a.rows, team_size, [&](int64_t row, bool inside) {
    Elements<S> x, z;
    x.load(static_cast<const T*>(a.x) + row * width, width, team, inside);
    if (a.z != nullptr) z.load(static_cast<const T*>(a.z) + row * width, width, team, inside);
    float s[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) s[i] = a.a * x[i];
    if (a.z != nullptr)
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) s[i] += a.c * z[i];
    if (a.sum != nullptr) {
      x.set(s);
      x.store(static_cast<T*>(a.sum) + row * width, width, team, inside);
    }
    const Standard<N> standard(s, width, a.eps, team, S{});
    standard.apply(s, a.weight, a.bias, width, team);
    x.set(s);
    x.store(static_cast<T*>(a.n) + row * width, width, team, inside);
  });
}

template <class S, Norm N>
__global__ void __launch_bounds__(S::kMostThreads, S::kFewestBackward) norm_backward(NormRows a, int team_size) {
  using T = typename S::Type;
  float* shared = shared_memory<float>();
  Team<S> team = team_of<S>(team_size, shared);
  const ColumnSums<S> of_weight{shared + kScratchFloats};
  const ColumnSums<S> of_bias{of_weight.sums + (a.partial_weight != nullptr ? S::kElements * int(blockDim.x) : 0)};
  if (a.partial_weight != nullptr) of_weight.clear();
  if (a.partial_bias != nullptr) of_bias.clear();
  const int width = a.width;
  each_row<S>(a.rows, team_size, [&](int64_t row, bool inside) {
    Elements<S> x, dn, residual;
    x.load(static_cast<const T*>(a.x) + row * width, width, team, inside);
    dn.load(static_cast<const T*>(a.grad) + row * width, width, team, inside);
    if (a.residual != nullptr) residual.load(static_cast<const T*>(a.residual) + row * width, width, team, inside);
    float y[S::kElements], g[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) y[i] = x[i];
    const Standard<N> standard(y, width, a.eps, team, S{});
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) y[i] = inside && team.has(i, width) ? standard(y[i]) : 0.f;
    if (a.partial_weight != nullptr)
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) of_weight.add(i, dn[i] * y[i]);
    if (a.partial_bias != nullptr)
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) of_bias.add(i, dn[i]);
    if (a.grad_x == nullptr) return;
    const Columns<S> weight(a.weight, 1.f, width, team);
    float sums[2] = {0.f, 0.f};  // <g, y>, sum of g
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
      g[i] = dn[i] * weight[i];
      sums[0] += g[i] * y[i];
      sums[1] += g[i];
    }
    team.sum(sums);
    const float along = sums[0] * standard.share, mean = N == Norm::layer ? sums[1] / float(width) : 0.f;
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) g[i] = standard.rstd * (g[i] - mean - y[i] * along);
    if (a.residual != nullptr)
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) g[i] += a.a * residual[i];
    x.set(g);
    x.store(static_cast<T*>(a.grad_x) + row * width, width, team, inside);
  });
  if (a.partial_weight == nullptr && a.partial_bias == nullptr) return;
  __syncthreads();
  if (a.partial_weight != nullptr) of_weight.store(a.partial_weight, width, team_size);
  if (a.partial_bias != nullptr) of_bias.store(a.partial_bias, width, team_size);
}

template <class Work>
void with_plan(const NormRows& a, const Work& work) {
  const RowPlan rows = row_plan(a.width, a.dtype);
  with_shape(a.dtype, rows, [&](auto shape) {
    if (a.norm == Norm::layer) work(rows, shape, std::integral_constant<Norm, Norm::layer>{});
    else if (a.norm == Norm::rms) work(rows, shape, std::integral_constant<Norm, Norm::rms>{});
    else work(rows, shape, std::integral_constant<Norm, Norm::sphere>{});
  });
}

// work(launch, kernel, team) for the backward pass, with so many sums over rows.
template <class Work>
void with_backward(const NormRows& a, int summed, void* stream, const Work& work) {
  with_plan(a, [&](const RowPlan& rows, auto shape, auto norm) {
    using S = decltype(shape);
    work(launch_of(rows, a.rows, kScratchFloats + size_t(summed) * rows.threads * S::kElements, stream),
         norm_backward<S, decltype(norm)::value>, rows.team);
  });
}

}  // namespace

int64_t norm_rows_blocks(const NormRows& a) {
  int64_t blocks = 0;
  with_backward(a, 2, nullptr, [&](const Launch& l, auto kernel, int) { blocks = blocks_that_sum(l, kernel); });
  return blocks;
}

void norm_rows_forward(const NormRows& a, void* stream) {
  with_plan(a, [&](const RowPlan& rows, auto shape, auto norm) {
    launch(launch_of(rows, a.rows, kScratchFloats, stream), norm_forward<decltype(shape), decltype(norm)::value>, a, rows.team);
  });
}

void norm_rows_backward(const NormRows& a, void* stream) {
  const int summed = (a.partial_weight != nullptr) + (a.partial_bias != nullptr);
  with_backward(a, summed, stream, [&](Launch l, auto kernel, int team) {
    if (summed > 0) l.blocks = a.blocks;
    launch(l, kernel, a, team);
  });
}

}  // namespace macaron_ops::cuda
