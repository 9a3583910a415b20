// The gradients of sphere_attend_step, in three passes:
//
//   rows      dy to dx past the attention, and to g_i = du_i / total_i, d_i = <g_i, u_i> (softmax; else 0)
//   queries   owns queries: dq_i = beta sum_j a_ij k_j, with a_ij = e_ij (<g_i, v_j> - d_i), e_ij = 2^(t_ij - m_i);
//             beta's gradient is the sum of <q_i, sum_j a_ij k_j>
//   keys      owns keys: dk_j = beta sum_i a_ij q_i, dv_j = sum_i e_ij g_i
//
// A pair takes 4P + 2 multiply-adds in queries (6P - 1 in keys) and one exponential: P = 3 is bound by the former. Memory
// is linear; a gradient that is x's is added to it, pass after pass, in one fixed order.
//
// Where one weight is nearly 1, <g_i, v_j> - d_i is a small difference of two numbers that were not rounded alike. In a
// softmax sum_j a_ij is 0; what it is instead, over total_i, is the error of d_i: queries takes as many times
// sum_j e_ij k_j off its sums, and leaves the settled d_i to keys. With one key, or equal values, the differences that
// keys sees are then exactly 0.
#include "sphere.h"

namespace macaron_ops::cuda {
namespace {

// -- rows ------------------------------------------------------------------------------------------------------------

template <int P>
__global__ void __launch_bounds__(kSphereThreads) sphere_rows(SphereAttendStep a, SphereGradients b) {
  const int64_t rows = a.batch * a.rows;
  Point<P> dc{};
  for (int64_t row = int64_t(blockIdx.x) * kSphereThreads + threadIdx.x; row < rows;
       row += int64_t(gridDim.x) * kSphereThreads) {
    const Point<P> dy = load_point<P>(b.grad, row, a.width, true), x = load_point<P>(a.x, row, a.width, true);
    const Point<P> u = load_point<P>(a.u, row, a.width, true);
    const PointStep<P> step(x, u, a.step, a.width);
    const float norm = sqrtf(dot(step.z, step.z)), length = fmaxf(norm, a.step.eps);
    const float radial = norm >= a.step.eps ? dot(dy, step.z) / length : 0.f;
    Point<P> dz, dv, dx, du;
#pragma unroll
    for (int c = 0; c < P; ++c) {
      dz.at[c] = (dy.at[c] - step.z.at[c] / length * radial) / length;
      dv.at[c] = step_at(a.step, c, a.width) * dz.at[c];
      dc.at[c] += dz.at[c] * step.v.at[c];
    }
    const bool difference = a.step.direction == Direction::difference;
    const float back = difference ? dot(dv, u) : dot(dv, x);
#pragma unroll
    for (int c = 0; c < P; ++c) {
      dx.at[c] = dz.at[c];
      du.at[c] = dv.at[c];
      if (a.step.direction == Direction::tangent) {
        dx.at[c] = dz.at[c] - back * u.at[c] - step.along * dv.at[c];
        du.at[c] = dv.at[c] - back * x.at[c];
      } else if (difference) {
        dx.at[c] = dz.at[c] - dv.at[c];
        du.at[c] = (dv.at[c] - (step.inside ? 0.f : u.at[c] / step.along * (back / step.along))) / step.along;
      }
    }
    if (b.x != nullptr) store_point(b.x, row, a.width, dx, false);
    if (!b.need_pairs) continue;
    const float total = a.total[row];
#pragma unroll
    for (int c = 0; c < P; ++c) du.at[c] = du.at[c] / total;
    store_point(b.g, row, a.width, du, false);
    b.offset[row] = a.softmax ? dot(du, u) : 0.f;
  }
  if (b.partial == nullptr) return;
  float* sums = shared_memory<float>();  // (warps, P)
#pragma unroll
  for (int c = 0; c < P; ++c) {
    float sum = dc.at[c];
    for (int other = kWarp / 2; other > 0; other /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, other);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp * P + c] = sum;
  }
  __syncthreads();
  const int columns = a.step.per_channel ? a.width : 1;
  if (int(threadIdx.x) < columns) {
    float total = 0.f;
    for (int w = 0; w < kSphereWarps; ++w)
      for (int c = int(threadIdx.x); c < P; c += a.step.per_channel ? P : 1) total += sums[w * P + c];
    b.partial[int64_t(blockIdx.x) * columns + threadIdx.x] = total;
  }
}

// -- queries ---------------------------------------------------------------------------------------------------------

template <int P, int R, bool SAME>
__global__ void __launch_bounds__(kSphereThreads) sphere_queries(SphereAttendStep a, SphereGradients b, int parts) {
  float* shared = shared_memory<float>();
  const Tile<P> keys{shared}, values{SAME ? shared : shared + Tile<P>::kFloats};
  const Owned<R> owned(a.rows, parts, a.causal);
  const float* key = a.key + owned.batch * a.keys * a.channels;
  const float* value = a.value + owned.batch * a.keys * a.width;
  const float beta = beta_of(a), scale = beta * kLog2E;
  Point<P> own[R], g[R], along_k[R]{}, mean_k[R]{};  // sum_j a_ij k_j, sum_j e_ij k_j
  float shift[R], offset[R], excess[R]{};            // sum_j a_ij
#pragma unroll
  for (int r = 0; r < R; ++r) {
    own[r] = scaled(load_point<P>(a.query, owned.at(r), a.channels, owned.inside(r)), scale);
    g[r] = load_point<P>(b.g, owned.at(r), a.width, owned.inside(r));
    shift[r] = owned.inside(r) ? a.shift[owned.at(r)] : 0.f;
    offset[r] = owned.inside(r) ? b.offset[owned.at(r)] : 0.f;
  }
  const int end = a.causal ? min(owned.end, a.keys) : a.keys;
  for (int first = 0; first < end; first += kTile<P>) {
    const int count = min(kTile<P>, end - first);
    __syncthreads();
    keys.fill(key, first, count, a.channels);
    if constexpr (!SAME) values.fill(value, first, count, a.width);
    __syncthreads();
    const bool masked = a.causal && first + count > owned.begin + 1;
    Point<P> tile_along[R]{}, tile_mean[R]{};
    float tile_excess[R]{};
    for (int j = owned.part; j < count; j += parts) {
      const Point<P> k = keys[j], v = SAME ? k : values[j];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float t = dot(own[r], k, -shift[r]);
        if (masked && first + j > owned.row(r)) t = -INFINITY;
        const float e = exp2_of(t), weighted = e * (dot(g[r], v) - offset[r]);
        tile_excess[r] += weighted;
        add(tile_along[r], weighted, k);
        if constexpr (!SAME) add(tile_mean[r], e, k);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      excess[r] += tile_excess[r];
      add(along_k[r], 1.f, tile_along[r]);
      if constexpr (!SAME) add(mean_k[r], 1.f, tile_mean[r]);
    }
  }
  const auto get = [&](int r, int n) {
    return n == 0 ? excess[r] : n <= P ? along_k[r].at[(n - 1) % P] : mean_k[r].at[(n - 1) % P];
  };
  constexpr int N = SAME ? P + 1 : 2 * P + 1;
  owned.template combine<N>(shared, get, [&](int r, const float* other) {
    excess[r] += other[0];
#pragma unroll
    for (int c = 0; c < P; ++c) {
      along_k[r].at[c] += other[(c + 1) * kWarp];
      if constexpr (!SAME) mean_k[r].at[c] += other[(c + 1 + P) * kWarp];
    }
  });
  if (owned.part != 0) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!owned.inside(r)) continue;
    const int64_t at = owned.at(r);
    if (a.softmax) {
      const float error = excess[r] / a.total[at];
      b.offset[at] = offset[r] + error;
      if constexpr (SAME) add(along_k[r], -excess[r], load_point<P>(a.u, at, a.width, true));
      else add(along_k[r], -error, mean_k[r]);
    }
    if (b.slope != nullptr) b.slope[at] = dot(load_point<P>(a.query, at, a.channels, true), along_k[r]);
    if (b.query != nullptr) store_point(b.query, at, a.channels, scaled(along_k[r], beta), b.add_query);
  }
}

// -- keys ------------------------------------------------------------------------------------------------------------

template <int P, int R>
__global__ void __launch_bounds__(kSphereThreads) sphere_keys(SphereAttendStep a, SphereGradients b, int parts) {
  float* shared = shared_memory<float>();
  const Tile<P> queries{shared}, gs{shared + Tile<P>::kFloats};
  float* facts = shared + 2 * Tile<P>::kFloats;  // (kTile, 2): shift, offset
  const Owned<R> owned(a.keys, parts, false);
  const float* query = a.query + owned.batch * a.rows * a.channels;
  const float* g = b.g + owned.batch * a.rows * a.width;
  const float beta = beta_of(a), scale = beta * kLog2E;
  Point<P> own[R], v[R], along_q[R]{}, along_g[R]{};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    own[r] = scaled(load_point<P>(a.key, owned.at(r), a.channels, owned.inside(r)), scale);
    v[r] = load_point<P>(a.value, owned.at(r), a.width, owned.inside(r));
  }
  const int begin = a.causal ? min(owned.begin, a.rows) / kTile<P> * kTile<P> : 0;
  for (int first = begin; first < a.rows; first += kTile<P>) {
    const int count = min(kTile<P>, a.rows - first);
    __syncthreads();
    queries.fill(query, first, count, a.channels);
    gs.fill(g, first, count, a.width);
    for (int i = int(threadIdx.x); i < 2 * count; i += kSphereThreads) {
      const int64_t at = owned.batch * a.rows + first + i / 2;
      facts[i] = i % 2 == 0 ? a.shift[at] : b.offset[at];
    }
    __syncthreads();
    const bool masked = a.causal && first < owned.end - 1;
    Point<P> tile_q[R]{}, tile_g[R]{};
    for (int i = owned.part; i < count; i += parts) {
      const Point<P> q = queries[i], g_i = gs[i];
      const float shift = facts[2 * i], offset = facts[2 * i + 1];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float t = dot(own[r], q, -shift);
        if (masked && owned.row(r) > first + i) t = -INFINITY;
        const float e = exp2_of(t);
        add(tile_q[r], e * (dot(g_i, v[r]) - offset), q);
        add(tile_g[r], e, g_i);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      add(along_q[r], 1.f, tile_q[r]);
      add(along_g[r], 1.f, tile_g[r]);
    }
  }
  const auto get = [&](int r, int n) { return n < P ? along_q[r].at[n % P] : along_g[r].at[n % P]; };
  owned.template combine<2 * P>(shared, get, [&](int r, const float* other) {
#pragma unroll
    for (int c = 0; c < P; ++c) {
      along_q[r].at[c] += other[c * kWarp];
      along_g[r].at[c] += other[(c + P) * kWarp];
    }
  });
  if (owned.part != 0) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!owned.inside(r)) continue;
    const int64_t at = owned.at(r);
    if (b.key != nullptr) store_point(b.key, at, a.channels, scaled(along_q[r], beta), b.add_key);
    if (b.value != nullptr) store_point(b.value, at, a.width, along_g[r], b.add_value);
  }
}

int widest(const SphereAttendStep& a) { return a.width > a.channels ? a.width : a.channels; }

}  // namespace

int64_t sphere_attend_step_blocks(const SphereAttendStep& a) {
  const int64_t needed = ceil_div(a.batch * a.rows, int64_t(kSphereThreads)), most = 4 * int64_t(processors());
  return needed < most ? needed : most;
}

void sphere_attend_step_backward(const SphereAttendStep& a, const SphereGradients& b, void* stream) {
  with_channels(widest(a), [&](auto channels) {
    constexpr int P = decltype(channels)::value, R = P <= 4 ? 2 : 1;
    launch({b.blocks, kSphereThreads, kSphereWarps * P * sizeof(float), stream}, sphere_rows<P>, a, b);
    if (!b.need_pairs) return;
    const bool keys = a.keys > 0 && (b.key != nullptr || b.value != nullptr);
    // Keys reads the offsets that queries settles.
    if (b.query != nullptr || b.slope != nullptr || (a.softmax && keys)) {
      const OwnerPlan plan = owner_plan(a.batch, a.rows, R);
      const Launch l = launch_of(plan, (a.same ? 1 : 2) * Tile<P>::kFloats, a.same ? P + 1 : 2 * P + 1, stream);
      if (a.same) launch(l, plan.many ? sphere_queries<P, R, true> : sphere_queries<P, 1, true>, a, b, plan.parts);
      else launch(l, plan.many ? sphere_queries<P, R, false> : sphere_queries<P, 1, false>, a, b, plan.parts);
    }
    if (keys) {
      const OwnerPlan plan = owner_plan(a.batch, a.keys, R);
      const Launch l = launch_of(plan, 2 * Tile<P>::kFloats + 2 * kTile<P>, 2 * P, stream);
      launch(l, plan.many ? sphere_keys<P, R> : sphere_keys<P, 1>, a, b, plan.parts);
    }
  });
}

}  // namespace macaron_ops::cuda
