// What kernels and launchers need of CUDA, for nvcc, and for g++ with MACARON_OPS_CUDA_ON_HOST (host/grid.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#ifdef MACARON_OPS_CUDA_ON_HOST
#include "host/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define MACARON_DEVICE __device__ __forceinline__

namespace macaron_ops::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
constexpr int power_of_2_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// -- launching -------------------------------------------------------------------------------------------------------

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared;  // bytes
  void* stream;   // a cudaStream_t
};

#ifdef MACARON_OPS_CUDA_ON_HOST

template <class Kernel, class... Arguments>
void launch(const Launch& l, Kernel kernel, const Arguments&... arguments) {
  cuda_on_host::run_grid(dim3(unsigned(l.blocks)), dim3(unsigned(l.threads)), l.shared, [&] { kernel(arguments...); });
}
inline int processors() { return 2; }  // so that few rows already take several turns
template <class Kernel>
int64_t resident(const Launch&, Kernel) {
  return 4 * processors();
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_host::block().shared);
}

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
template <class Kernel>
void allow_shared(const Launch& l, Kernel kernel) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (l.shared > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared)));
}
template <class Kernel, class... Arguments>
void launch(const Launch& l, Kernel kernel, const Arguments&... arguments) {
  allow_shared(l, kernel);
  kernel<<<unsigned(l.blocks), unsigned(l.threads), l.shared, static_cast<cudaStream_t>(l.stream)>>>(arguments...);
  check(cudaGetLastError());
}
inline int processors() {  // of the current device
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}
// How many blocks of a kernel the current device has at a time.
template <class Kernel>
int64_t resident(const Launch& l, Kernel kernel) {
  allow_shared(l, kernel);
  int of_a_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_a_processor, kernel, l.threads, l.shared));
  return int64_t(of_a_processor) * processors();
}

template <class T>
MACARON_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char macaron_shared[];
  return reinterpret_cast<T*>(macaron_shared);
}

#endif

// -- numbers ---------------------------------------------------------------------------------------------------------

template <class To, class From>
MACARON_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MACARON_DEVICE float to_float(float value) { return value; }
MACARON_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
MACARON_DEVICE float to_float(half value) { return __half2float(value); }

template <class T>
MACARON_DEVICE T rounded(float value);
template <>
MACARON_DEVICE float rounded<float>(float value) {
  return value;
}
template <>
MACARON_DEVICE bf16 rounded<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
MACARON_DEVICE half rounded<half>(float value) {
  return __float2half_rn(value);
}

// Number i of those that a register holds, the first one in its low half.
template <class T>
MACARON_DEVICE float unpacked(uint32_t bits, int i) {
  if constexpr (sizeof(T) == 4) return bits_as<T>(bits);
  else if constexpr (__is_same(T, bf16)) return bits_as<float>(i == 0 ? bits << 16 : bits & 0xffff0000u);
  else return to_float(bits_as<T>(uint16_t(bits >> 16 * i)));
}
// Two numbers of 16 bits in a register.
template <class T>
MACARON_DEVICE uint32_t packed(float low, float high) {
  struct alignas(4) {
    T at[2];
  } pair = {{rounded<T>(low), rounded<T>(high)}};
  return bits_as<uint32_t>(pair);
}

// 2^t within 2 ulp; less than 2^-126 is 0. exp2f would spend three more instructions on such small numbers.
MACARON_DEVICE float exp2_of(float t) {
#ifdef MACARON_OPS_CUDA_ON_HOST
  const float power = std::exp2(t);
  return power < 0x1p-126f ? 0.f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return power;
#endif
}

}  // namespace macaron_ops::cuda
