// Rows in registers: what the row kernels share.
//
// A team of threads has a row: some lanes of a warp where rows are short (several rows to a block), a whole block where
// they are long. A thread has CHUNKS vectors of V neighbouring elements, a team's width apart, so that a warp reads
// neighbouring 16 bytes a lane. They stay in registers as they were read (a vector of 16 bits takes half of what its
// floats would), and every element is read once. V is 1 where rows are not a multiple of 16 bytes.
#pragma once

#include <type_traits>

#include "device.h"
#include "operators.h"

namespace macaron_ops::cuda {

// V neighbouring elements, as one read or write. They are whole registers: a compiler that is shown numbers of 16 bits
// moves them one by one.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  static constexpr int kPacked = V == 1 ? 1 : 4 / int(sizeof(T));
  std::conditional_t<V == 1, T, uint32_t> at[V / kPacked];

  MACARON_DEVICE float operator[](int i) const {
    if constexpr (V == 1) return to_float(at[0]);
    else return unpacked<T>(at[i / kPacked], i % kPacked);
  }
  MACARON_DEVICE void set(const float* values) {
    if constexpr (V == 1) at[0] = rounded<T>(values[0]);
    else
#pragma unroll
      for (int i = 0; i < V; i += kPacked) {
        if constexpr (kPacked == 1) at[i] = bits_as<uint32_t>(values[i]);
        else at[i / 2] = packed<T>(values[i], values[i + 1]);
      }
  }
};

template <class T, int V_, int CHUNKS_, bool BLOCK_>
struct Shape {
  using Type = T;
  static constexpr int V = V_, CHUNKS = CHUNKS_, kElements = V_ * CHUNKS_;
  static constexpr bool BLOCK = BLOCK_;  // a team is a block
  static constexpr bool WARP = !BLOCK_ && CHUNKS_ > 1;  // a warp; else some of its lanes, or all
  static constexpr int kMostThreads = BLOCK_ ? 512 : 128;
  // Blocks that a processor has at a time. Forward 32 KiB of each tensor are then on their way (24 of the shortest rows): at
  // 4.2 TB/s memory has as much to bring to 132 processors in a microsecond. Backward a thread may have 128 registers, with
  // 32 elements 168.
  static constexpr int kFewestForward = BLOCK_ ? 1 : CHUNKS_ == 1 ? 12 : 16 / CHUNKS_;
  static constexpr int kFewestBackward = BLOCK_ ? 1 : kElements <= 16 ? 4 : 3;
};

// The threads that have a row.
template <class S>
struct Team {
  int size, lane;
  float* scratch;  // of a block: two halves, one number a warp; sums take them in turn, so that one barrier is enough
  int turn = 0;

  // The column of element i, which may be past the row's end.
  MACARON_DEVICE int column(int i) const { return (lane + i / S::V * size) * S::V + i % S::V; }

  // Whether element i is one of the row, of which vectors are whole.
  MACARON_DEVICE bool has(int i, int width) const { return column(i - i % S::V) < width; }

  // The team's sums, in every lane. All threads of a block call it together.
  template <int N>
  MACARON_DEVICE void sum(float (&values)[N]) {
    const int within = S::BLOCK || S::WARP ? kWarp : size;
#pragma unroll
    for (int other = within / 2; other > 0; other /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(kWholeWarp, values[n], other);
    if constexpr (S::BLOCK) {
      static_assert(N <= 2);
      const int warps = size / kWarp;
      float* half = scratch + turn * 2 * kWarp;
      turn ^= 1;
      if (lane % kWarp == 0)
#pragma unroll
        for (int n = 0; n < N; ++n) half[n * kWarp + lane / kWarp] = values[n];
      __syncthreads();
#pragma unroll
      for (int n = 0; n < N; ++n) {
        values[n] = 0.f;
        for (int w = 0; w < warps; ++w) values[n] += half[n * kWarp + w];
      }
    }
  }
  MACARON_DEVICE float sum(float value) {
    float values[1] = {value};
    sum(values);
    return values[0];
  }
};
constexpr size_t kScratchFloats = 4 * kWarp;

template <class S>
MACARON_DEVICE Team<S> team_of(int size, float* scratch) {
  return {size, S::BLOCK ? int(threadIdx.x) : int(threadIdx.x) % (S::WARP ? kWarp : size), scratch};
}

// A thread's elements of a row.
template <class S>
struct Elements {
  using T = typename S::Type;
  Vector<T, S::V> chunks[S::CHUNKS];

  MACARON_DEVICE float operator[](int i) const { return chunks[i / S::V][i % S::V]; }
  MACARON_DEVICE void set(const float (&values)[S::kElements]) {
#pragma unroll
    for (int k = 0; k < S::CHUNKS; ++k) chunks[k].set(values + k * S::V);
  }

  // 0 past the row's end, and where `inside` is false.
  MACARON_DEVICE void load(const T* row, int width, const Team<S>& team, bool inside) {
#pragma unroll
    for (int k = 0; k < S::CHUNKS; ++k) {
      const int first = team.column(k * S::V);
      chunks[k] = {};
      if (inside && first < width) chunks[k] = *reinterpret_cast<const Vector<T, S::V>*>(row + first);
    }
  }
  MACARON_DEVICE void store(T* row, int width, const Team<S>& team, bool inside) const {
#pragma unroll
    for (int k = 0; k < S::CHUNKS; ++k) {
      const int first = team.column(k * S::V);
      if (inside && first < width) *reinterpret_cast<Vector<T, S::V>*>(row + first) = chunks[k];
    }
  }
};

// Of a parameter (width,) what belongs to a thread's vector k, read as vectors: `otherwise` where it is not given, 0 past
// its end.
template <class S>
MACARON_DEVICE void read_columns(float* numbers, int k, const float* parameter, float otherwise, int width,
                                 const Team<S>& team) {
  constexpr int kTogether = S::V == 1 ? 1 : 4;
  const int first = team.column(k * S::V);
#pragma unroll
  for (int v = 0; v < S::V; v += kTogether) {
    Vector<float, kTogether> found{};
    if (parameter != nullptr && first < width)
      found = *reinterpret_cast<const Vector<float, kTogether>*>(parameter + first + v);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) numbers[v + i] = parameter != nullptr ? found[i] : otherwise;
  }
}
// All of it.
template <class S>
struct Columns {
  float at[S::kElements];

  MACARON_DEVICE Columns(const float* parameter, float otherwise, int width, const Team<S>& team) {
#pragma unroll
    for (int k = 0; k < S::CHUNKS; ++k) read_columns(at + k * S::V, k, parameter, otherwise, width, team);
  }
  MACARON_DEVICE float operator[](int i) const { return at[i]; }
};

// body(row, inside) for the rows that this thread's team takes; every thread of a warp takes as many turns. `row` is a
// row that is there even where `inside` is false.
template <class S, class Body>
MACARON_DEVICE void each_row(int64_t rows, int team, const Body& body) {
  if constexpr (S::WARP) team = kWarp;
  const int teams = S::BLOCK ? 1 : int(blockDim.x) / team;
  const int mine = S::BLOCK ? 0 : int(threadIdx.x) / team;
  for (int64_t first = int64_t(blockIdx.x) * teams; first < rows; first += int64_t(gridDim.x) * teams)
    body(min(first + mine, rows - 1), first + mine < rows);
}

// -- sums over rows --------------------------------------------------------------------------------------------------

// A thread's own sums over the rows that it has met, in shared memory: a gradient of (width,).
template <class S>
struct ColumnSums {
  float* sums;  // (kElements, threads)

  MACARON_DEVICE void clear() const {
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) sums[i * blockDim.x + threadIdx.x] = 0.f;
  }
  MACARON_DEVICE void add(int i, float value) const { sums[i * blockDim.x + threadIdx.x] += value; }

  // The block's sums to its row of a partial result (blocks, width). After a barrier.
  MACARON_DEVICE void store(float* partial, int width, int team) const {
    const int teams = S::BLOCK ? 1 : int(blockDim.x) / team;
    for (int at = int(threadIdx.x); at < team * S::kElements; at += int(blockDim.x)) {
      const int i = at / team, lane = at % team;
      const int column = (lane + i / S::V * team) * S::V + i % S::V;
      float total = 0.f;
      for (int t = 0; t < teams; ++t) total += sums[i * int(blockDim.x) + t * team + lane];
      if (column < width) partial[int64_t(blockIdx.x) * width + column] = total;
    }
  }
};

// -- planning --------------------------------------------------------------------------------------------------------

constexpr int kLongestByVectors = 8192, kLongestByElements = 4096;  // macaron_ops/native/cuda/rows.py has them too
constexpr int kInBlock = 16;  // elements of a thread at most where a block has a row

struct RowPlan {
  bool vectors, block;
  int chunks, team, threads;
  int rows_per_block;

  int64_t blocks(int64_t rows) const { return ceil_div(rows, int64_t(rows_per_block)); }
};

// Of tensors that begin at a multiple of 16 bytes.
inline RowPlan row_plan(int width, Dtype dtype) {
  const int per_vector = dtype == Dtype::float32 ? 4 : 8;
  RowPlan plan{};
  plan.vectors = width % per_vector == 0;
  const int count = plan.vectors ? width / per_vector : width;
  if (width > (plan.vectors ? kLongestByVectors : kLongestByElements)) throw std::runtime_error("rows are too long");
  plan.block = count > 4 * kWarp;
  if (plan.block) {
    plan.chunks = plan.vectors ? kInBlock / per_vector : kInBlock / 2;
    plan.threads = ceil_div(ceil_div(count, plan.chunks), kWarp) * kWarp;
    plan.team = plan.threads;
    plan.rows_per_block = 1;
  } else {
    plan.chunks = count <= kWarp ? 1 : plan.vectors && count <= 2 * kWarp ? 2 : 4;
    plan.team = plan.chunks == 1 ? power_of_2_from(count) : kWarp;
    plan.threads = 128;
    plan.rows_per_block = plan.threads / plan.team;
  }
  return plan;
}

// The launch of a kernel, of blocks enough for all rows.
inline Launch launch_of(const RowPlan& plan, int64_t rows, size_t floats, void* stream) {
  return {plan.blocks(rows), plan.threads, floats * sizeof(float), stream};
}
// Blocks of a kernel that keeps sums over rows: no more than there are at a time, all of which walk over as many rows.
template <class Kernel>
int64_t blocks_that_sum(const Launch& l, Kernel kernel) {
  const int64_t most = resident(l, kernel);
  return l.blocks < most ? l.blocks : most;
}

// work(Shape{}) for a plan.
template <class T, class Work>
void with_shape(const RowPlan& plan, const Work& work) {
  constexpr int V = 16 / int(sizeof(T));
  if (plan.vectors && plan.block) return work(Shape<T, V, kInBlock / V, true>{});
  if (plan.block) return work(Shape<T, 1, kInBlock / 2, true>{});
  if (plan.vectors && plan.chunks == 1) return work(Shape<T, V, 1, false>{});
  if (plan.vectors && plan.chunks == 2) return work(Shape<T, V, 2, false>{});
  if (plan.vectors) return work(Shape<T, V, 4, false>{});
  if (plan.chunks == 1) return work(Shape<T, 1, 1, false>{});
  return work(Shape<T, 1, 4, false>{});
}

template <class Work>
void with_shape(Dtype dtype, const RowPlan& plan, const Work& work) {
  if (dtype == Dtype::float32) with_shape<float>(plan, work);
  else if (dtype == Dtype::bfloat16) with_shape<bf16>(plan, work);
  else with_shape<half>(plan, work);
}

}  // namespace macaron_ops::cuda
