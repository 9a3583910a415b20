// sphere_attend_step, forward: u_i = sum_j w_ij v_j, w_ij = 2^(t_ij - m_i) / total_i, t_ij = beta log2(e) <q_i, k_j>, and
// the step of normalize_step; for particles of few channels, where matrix products would multiply zeros.
//
// Reads and writes are linear in the particles, arithmetic is quadratic. A pair of P channels takes 2P + 2 instructions
// of the multiply-add unit (P for the score, whose sum begins at -m_i; one for the largest score; one for the total; P
// for u), and one exponential. An H100 does 128 of the former and 16 of the latter a cycle and processor: for P = 3
// 256 pairs take 16 cycles either way, and to compute some exponentials by polynomials, of about ten
// instructions, would gain 1 part in 20 at the most. 2^20 particles are 2^40 pairs: 0.3 s at 132 processors and 1.75 GHz.
//
// m_i is the score with the first key, and changes only where a score is more than 2^4 above it, which is rare, exact and
// out of the common path: sums in float32 have as many digits wherever they are.
#include "sphere.h"

namespace macaron_ops::cuda {
namespace {

constexpr float kHigh = 16.f;

template <int P, int R, bool SAME>
struct Attention {
  Point<P> own[R];  // q beta log2(e)
  float shift[R];
  float total[R], tile_total[R];
  Point<P> u[R], tile_u[R];

  MACARON_DEVICE void begin_tile() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      tile_total[r] = 0.f;
      tile_u[r] = {};
    }
  }
  MACARON_DEVICE void end_tile() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      total[r] += tile_total[r];
      add(u[r], 1.f, tile_u[r]);
    }
  }

  MACARON_DEVICE void move_shift(int r, float to) {
    const float factor = exp2_of(shift[r] - to);
    shift[r] = to;
    total[r] *= factor;
    tile_total[r] *= factor;
    u[r] = scaled(u[r], factor);
    tile_u[r] = scaled(tile_u[r], factor);
  }

  // The keys j ... j + kTogether - 1 of a tile; where MASKED, row r sees the first seen(r) keys of the tile.
  template <bool MASKED, class Seen>
  MACARON_DEVICE void meet(const Tile<P>& keys, const Tile<P>& values, int j, const Seen& seen) {
    float t[R][kTogether];
    const auto score = [&](int r) {
      float most = -INFINITY;
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
        t[r][c] = dot(own[r], keys[j + c], -shift[r]);
        if (MASKED && j + c >= seen(r)) t[r][c] = -INFINITY;
        most = fmaxf(most, t[r][c]);
      }
      return most;
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float most = score(r);
      if (most > kHigh) {
        move_shift(r, shift[r] + most);
        score(r);
      }
    }
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
      const Point<P> v = SAME ? keys[j + c] : values[j + c];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float e = exp2_of(t[r][c]);
        tile_total[r] += e;
        add(tile_u[r], e, v);
      }
    }
  }
};

// The row's step, and what is saved of it.
template <int P>
MACARON_DEVICE void finish(const SphereAttendStep& a, int64_t at, Point<P> u, float shift, float total) {
  if (a.keys == 0) total = 1.f;
  else if (!a.softmax) total = exp2_of(-shift) * float(a.keys);
  if (a.softmax && total - total == 0.f && (a.keys == 1 || (a.causal && at % a.rows == 0))) {
    // One key's weight is 1, whatever its score's rounding: then u is its value, and no score has a gradient.
    u = load_point<P>(a.value, at / a.rows * a.keys, a.width, a.keys > 0);
    total = 1.f;
  }
#pragma unroll
  for (int c = 0; c < P; ++c) u.at[c] = u.at[c] / total;
  if (a.u != nullptr) {
    store_point(a.u, at, a.width, u, false);
    a.shift[at] = shift;
    a.total[at] = total;
  }
  const Point<P> x = load_point<P>(a.x, at, a.width, true);
  const PointStep<P> step(x, u, a.step, a.width);
  const float length = fmaxf(sqrtf(dot(step.z, step.z)), a.step.eps);
  Point<P> y;
#pragma unroll
  for (int c = 0; c < P; ++c) y.at[c] = step.z.at[c] / length;
  store_point(a.y, at, a.width, y, false);
}

template <int P, int R, bool SAME>
__global__ void __launch_bounds__(kSphereThreads) sphere_forward(SphereAttendStep a, int parts) {
  float* shared = shared_memory<float>();
  const Tile<P> keys{shared}, values{SAME ? shared : shared + Tile<P>::kFloats};
  const Owned<R> owned(a.rows, parts, a.causal);
  const float* key = a.key + owned.batch * a.keys * a.channels;
  const float* value = a.value + owned.batch * a.keys * a.width;
  const float scale = beta_of(a) * kLog2E;
  Attention<P, R, SAME> s;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    s.own[r] = scaled(load_point<P>(a.query, owned.at(r), a.channels, owned.inside(r)), scale);
    const float first = a.keys > 0 ? dot(s.own[r], load_point<P>(key, 0, a.channels, true)) : 0.f;
    s.shift[r] = fabsf(first) < INFINITY ? first : 0.f;
    s.total[r] = 0.f;
    s.u[r] = {};
  }
  const int whole = a.causal ? min(owned.begin + 1, a.keys) : a.keys;  // every owner sees the keys before it
  const int end = a.causal ? min(owned.end, a.keys) : a.keys;
  for (int first = 0; first < end; first += kTile<P>) {
    const int count = min(kTile<P>, end - first);
    __syncthreads();
    keys.fill(key, first, count, a.channels);
    if constexpr (!SAME) values.fill(value, first, count, a.width);
    __syncthreads();
    const int step = parts * kTogether;
    const auto seen = [&](int r) { return min(count, a.causal ? owned.row(r) + 1 - first : count); };
    s.begin_tile();
    if (first + kTile<P> <= whole)
#pragma unroll 1
      for (int j = owned.part * kTogether; j < kTile<P>; j += step) s.template meet<false>(keys, values, j, seen);
    else
#pragma unroll 1
      for (int j = owned.part * kTogether; j < count; j += step) s.template meet<true>(keys, values, j, seen);
    s.end_tile();
  }
  const auto get = [&](int r, int n) { return n == 0 ? s.shift[r] : n == 1 ? s.total[r] : s.u[r].at[n - 2]; };
  owned.template combine<P + 2>(shared, get, [&](int r, const float* other) {
    const float to = fmaxf(s.shift[r], other[0]), factor = exp2_of(other[0] - to);
    s.tile_u[r] = {};
    s.move_shift(r, to);
    s.total[r] += other[kWarp] * factor;
#pragma unroll
    for (int c = 0; c < P; ++c) s.u[r].at[c] += other[(c + 2) * kWarp] * factor;
  });
  if (owned.part == 0)
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (owned.inside(r)) finish(a, owned.at(r), s.u[r], s.shift[r], s.total[r]);
}

}  // namespace

void sphere_attend_step_forward(const SphereAttendStep& a, void* stream) {
  with_channels(a.width > a.channels ? a.width : a.channels, [&](auto channels) {
    constexpr int P = decltype(channels)::value;
    const auto start = [&](auto most, auto same) {
      constexpr int R = decltype(most)::value;
      constexpr bool SAME = decltype(same)::value;
      const OwnerPlan plan = owner_plan(a.batch, a.rows, R);
      const Launch l = launch_of(plan, (SAME ? 1 : 2) * Tile<P>::kFloats, P + 2, stream);
      launch(l, plan.many ? sphere_forward<P, R, SAME> : sphere_forward<P, 1, SAME>, a, plan.parts);
    };
    // As many owners as registers have room for.
    constexpr int kMost = P <= 3 ? 4 : P == 4 ? 2 : 1;
    if (a.same) start(std::integral_constant<int, P == 8 ? 2 : kMost>{}, std::true_type{});
    else start(std::integral_constant<int, kMost>{}, std::false_type{});
  });
}

}  // namespace macaron_ops::cuda
