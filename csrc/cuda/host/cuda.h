// CUDA C++ as the kernels of this folder use it, for g++: see grid.h. Nothing of the CUDA toolkit is needed. What is
// missing here does not compile, as static __shared__ arrays, which could not be filled with NaN: take shared_memory().
#pragma once

#include <cmath>

#include "grid.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_host {

inline dim3 thread_index() {
  const Block& b = block();
  const unsigned i = unsigned(current()->index);
  return dim3(i % b.dim.x, i / b.dim.x % b.dim.y, i / b.dim.x / b.dim.y);
}

template <class T>
T shuffle(uint32_t mask, T value, int from, Site site) {
  T found;
  std::memcpy(&found, exchange(mask, &value, sizeof value, site)[from], sizeof found);
  return found;
}
inline int lane() { return current()->index % kWarp; }

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_index())
#define blockIdx (cuda_on_host::block().index)
#define blockDim (cuda_on_host::block().dim)
#define gridDim (cuda_on_host::block().grid)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::wait_for_block({file, line});
}
inline void __syncwarp(uint32_t mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const char nothing = 0;
  cuda_on_host::exchange(mask, &nothing, 1, {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ lanes, {file, line});
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, from, {file, line});
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::max;
using std::min;
