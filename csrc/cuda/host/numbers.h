// The two 16-bit floating types and their conversions, rounding to nearest even as the GPU does.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace cuda_on_host {
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace cuda_on_host

inline float __bfloat162float(__nv_bfloat16 value) { return cuda_on_host::of_bits(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = cuda_on_host::bits_of(value);
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return cuda_on_host::of_bits(sign | 0x7f800000u | fraction << 13);
  const float size = exponent == 0 ? float(fraction) * 0x1p-24f
                                   : cuda_on_host::of_bits((exponent + 112) << 23 | fraction << 13);
  return sign != 0 ? -size : size;
}
inline __half __float2half_rn(float value) {
  const uint32_t bits = cuda_on_host::bits_of(value), size = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
  // Adding a power of two, and taking it off the bits again, leaves the sum rounded to where the fraction ends.
  if (size < 0x38800000u)
    return {uint16_t(sign | (cuda_on_host::bits_of(cuda_on_host::of_bits(size) + 0.5f) - 0x3f000000u))};
  return {uint16_t(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13)};
}
