// What the kernels of sphere_attend_step share: particles of P <= 16 channels in registers.
//
// A thread owns R particles and meets the others, which a block brings into shared memory a tile at a time: one read of
// a particle there serves R owners of every lane. Where particles are few, `parts` warps share the same owners, each
// meets some of the others, and their sums are added in the end, in a fixed order.
//
// A sum is begun anew with every tile and then added to a total, so that no chain of additions is as long as the
// particles are many.
#pragma once

#include "step.h"

namespace macaron_ops::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kSphereThreads = 256, kSphereWarps = kSphereThreads / kWarp;
constexpr int kTogether = 4;  // others whose scores are computed before their weights are

template <int P>
constexpr int kPadded = P == 3 ? 4 : P;
template <int P>
constexpr int kTile = P <= 4 ? 256 : P <= 8 ? 128 : 64;

template <int P>
struct Point {
  float at[P];
};

// Explicitly fused, so that every kernel rounds a product alike.
template <int P>
MACARON_DEVICE float dot(const Point<P>& a, const Point<P>& b, float start) {
  float sum = start;
#pragma unroll
  for (int c = 0; c < P; ++c) sum = fmaf(a.at[c], b.at[c], sum);
  return sum;
}
template <int P>
MACARON_DEVICE float dot(const Point<P>& a, const Point<P>& b) {
  return dot(a, b, 0.f);
}
template <int P>
MACARON_DEVICE void add(Point<P>& sum, float factor, const Point<P>& term) {
#pragma unroll
  for (int c = 0; c < P; ++c) sum.at[c] = fmaf(factor, term.at[c], sum.at[c]);
}
template <int P>
MACARON_DEVICE Point<P> scaled(const Point<P>& point, float factor) {
  Point<P> result;
#pragma unroll
  for (int c = 0; c < P; ++c) result.at[c] = point.at[c] * factor;
  return result;
}

// A row of a tensor (..., width), zeros past its channels, or all zeros.
template <int P>
MACARON_DEVICE Point<P> load_point(const float* rows, int64_t row, int width, bool inside) {
  Point<P> point;
#pragma unroll
  for (int c = 0; c < P; ++c) point.at[c] = inside && c < width ? rows[row * width + c] : 0.f;
  return point;
}
template <int P>
MACARON_DEVICE void store_point(float* rows, int64_t row, int width, const Point<P>& point, bool add_to) {
#pragma unroll
  for (int c = 0; c < P; ++c)
    if (c < width) rows[row * width + c] = point.at[c] + (add_to ? rows[row * width + c] : 0.f);
}

// The step of normalize_step for a row in one thread: step.h has it for a team.
template <int P>
struct PointStep {
  Point<P> v, z;       // z = x + c v
  float along = 0.f;   // <u, x>; for "difference" max(|u|, eps)
  bool inside = false; // "difference": |u| < eps

  MACARON_DEVICE PointStep(const Point<P>& x, const Point<P>& u, const Step& step, int width) {
    if (step.direction == Direction::tangent) {
      along = dot(u, x);
    } else if (step.direction == Direction::difference) {
      const float length = sqrtf(dot(u, u));
      inside = length < step.eps;
      along = fmaxf(length, step.eps);
    }
#pragma unroll
    for (int c = 0; c < P; ++c) {
      v.at[c] = u.at[c];
      if (step.direction == Direction::tangent) v.at[c] = u.at[c] - along * x.at[c];
      if (step.direction == Direction::difference) v.at[c] = u.at[c] / along - x.at[c];
      z.at[c] = x.at[c] + step_at(step, c, width) * v.at[c];
    }
  }
};

// -- tiles -----------------------------------------------------------------------------------------------------------

// Particles in shared memory, 16 bytes to a read.
template <int P>
struct Tile {
  static constexpr int kFloats = kTile<P> * kPadded<P>;
  float* points;

  // `count` of them, those of `rows` from `first` on; zeros after them.
  MACARON_DEVICE void fill(const float* rows, int64_t first, int count, int width) const {
    for (int i = int(threadIdx.x); i < kFloats; i += kSphereThreads) {
      const int point = i / kPadded<P>, c = i % kPadded<P>;
      points[i] = point < count && c < width ? rows[(first + point) * width + c] : 0.f;
    }
  }
  MACARON_DEVICE Point<P> operator[](int i) const {
    Point<P> point;
    if constexpr (P == 2) {
      const float2 v = *reinterpret_cast<const float2*>(points + i * 2);
      point.at[0] = v.x;
      point.at[1] = v.y;
    } else {
#pragma unroll
      for (int c = 0; c < P; c += 4) {
        const float4 v = *reinterpret_cast<const float4*>(points + i * kPadded<P> + c);
        point.at[c] = v.x;
        point.at[c + 1] = v.y;
        point.at[c + 2] = v.z;
        if (c + 3 < P) point.at[(c + 3) % P] = v.w;
      }
    }
    return point;
  }
};

// -- owners ----------------------------------------------------------------------------------------------------------

// Which rows of which batch element a thread owns, and which others its warp meets.
template <int R>
struct Owned {
  int64_t batch;
  int begin, end;  // the block's rows
  int first;       // the thread's: first, first + kWarp, ...
  int rows;        // of the batch element
  int part, parts;

  // `backward`: the last rows first, which see most where they are causal.
  MACARON_DEVICE Owned(int rows, int parts, bool backward) : rows(rows), part(int(threadIdx.x) / kWarp % parts), parts(parts) {
    const int each = kSphereWarps / parts * kWarp * R, blocks = ceil_div(rows, each);
    batch = blockIdx.x / blocks;
    const int block = int(blockIdx.x % blocks);
    begin = (backward ? blocks - 1 - block : block) * each;
    end = min(begin + each, rows);
    first = begin + int(threadIdx.x) / kWarp / parts * kWarp * R + int(threadIdx.x) % kWarp;
  }
  MACARON_DEVICE int row(int r) const { return first + r * kWarp; }
  MACARON_DEVICE bool inside(int r) const { return row(r) < rows; }
  MACARON_DEVICE int64_t at(int r) const { return batch * rows + row(r); }

  // Adds the sums of N floats an owner of the other parts to those of part 0. All threads call it.
  template <int N, class Get, class Add>
  MACARON_DEVICE void combine(float* shared, const Get& get, const Add& add) const {
    if (parts == 1) return;
    __syncthreads();
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int n = 0; n < N; ++n) shared[(warp * N + n) * kWarp + lane] = get(r, n);
      __syncthreads();
      if (part == 0)
        for (int other = 1; other < parts; ++other) add(r, shared + (warp + other) * N * kWarp + lane);
      __syncthreads();
    }
  }
};

MACARON_DEVICE float beta_of(const SphereAttendStep& a) { return a.beta_tensor != nullptr ? a.beta_tensor[0] : a.beta; }

// How a launch shares its owners out: R of them a thread where that fills the device.
struct OwnerPlan {
  bool many;  // R is the kernel's most, else 1
  int parts;
  int64_t blocks;
};

inline OwnerPlan owner_plan(int64_t batch, int rows, int most) {
  const int64_t enough = 2 * int64_t(processors());
  for (const bool many : {true, false})
    for (int parts = 1; parts <= kSphereWarps; parts *= 2) {
      const int64_t blocks = batch * ceil_div(rows, kSphereWarps / parts * kWarp * (many ? most : 1));
      if (blocks >= enough || (!many && parts == kSphereWarps)) return {many, parts, blocks};
    }
  return {};
}

// Of a kernel that needs `tiles` floats of shared memory, and `sums` for an owner to combine its parts.
inline Launch launch_of(const OwnerPlan& plan, int tiles, int sums, void* stream) {
  const int floats = plan.parts == 1 || tiles > sums * kSphereThreads ? tiles : sums * kSphereThreads;
  return {plan.blocks, kSphereThreads, size_t(floats) * sizeof(float), stream};
}

// work(std::integral_constant<int, P>{}) for the channels of a call.
template <class Work>
void with_channels(int channels, const Work& work) {
  if (channels <= 2) work(std::integral_constant<int, 2>{});
  else if (channels == 3) work(std::integral_constant<int, 3>{});
  else if (channels == 4) work(std::integral_constant<int, 4>{});
  else if (channels <= 8) work(std::integral_constant<int, 8>{});
  else if (channels <= 16) work(std::integral_constant<int, 16>{});
  else throw std::runtime_error("particles of more than 16 channels");
}

}  // namespace macaron_ops::cuda
