// Counter-based dropout, bit for bit the mask of macaron_ops/reference/dropout.py: Philox-4x32-10 with
// key = seed and counter = (position mod 2^32, position div 2^32 + stream 2^20, 0, 0).
// Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
#pragma once

#include "operators.h"
#include "vec.h"

namespace macaron_ops::MACARON_OPS_ISA {

struct Wide {
  VecU low, high;
};

MACARON_INLINE Wide multiply_wide(VecU a, uint32_t factor) {
  typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));
  const VecU64 lanes = (VecU64)a;
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi64(factor);
  const VecU64 even = (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)lanes, f);
  const VecU64 odd = (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)(lanes >> 32), f);
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi64x(factor);
  const VecU64 even = (VecU64)_mm256_mul_epu32((__m256i)lanes, f);
  const VecU64 odd = (VecU64)_mm256_mul_epu32((__m256i)(lanes >> 32), f);
#else
  const VecU64 even = (lanes & 0xffffffffu) * uint64_t(factor), odd = (lanes >> 32) * uint64_t(factor);
#endif
  // Each 64-bit lane is two 32-bit ones, the lower one first (little endian).
  return {(VecU)((even & 0xffffffffu) | (odd << 32)), (VecU)((even >> 32) | (odd & ~uint64_t(0xffffffffu)))};
}

MACARON_INLINE VecU philox(VecU c0, VecU c1, uint64_t seed) {
  VecU c2 = {}, c3 = {};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide a = multiply_wide(c0, 0xD2511F53u), b = multiply_wide(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0;
    c2 = a.high ^ c3 ^ k1;
    c1 = b.low;
    c3 = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// A dropout with what is the same for all its elements computed once.
class Drop {
 public:
  explicit Drop(const Dropout& dropout)
      : on_(dropout.p != 0.0),
        p_(float(dropout.p)),
        seed_(dropout.seed),
        stream_(uint32_t(dropout.stream) << 20),
        scale_(dropout.p < 1.0 ? float(1.0 / (1.0 - dropout.p)) : 0.f) {}

  explicit operator bool() const { return on_; }

  // Whether the elements at position + lane * stride are kept. Both halves of lane * stride depend on the stride alone,
  // and leave the loop that this stands in.
  __attribute__((always_inline)) VecI kept(int64_t position, int64_t stride = 1) const {
    const VecU lane = (VecU)counting();
    const uint32_t lower = uint32_t(stride), upper = uint32_t(uint64_t(stride) >> 32);
    const VecU offset = lane * lower;  // and what it loses, in 16-bit digits:
    const VecU lost = ((lane * (lower & 0xffffu) >> 16) + lane * (lower >> 16)) >> 16;
    const VecU low = offset + uint32_t(uint64_t(position));
    const VecU carry = (VecU)(low < offset) & 1u;
    const VecU high = (carry + (lost + lane * upper) + uint32_t(uint64_t(position) >> 32)) | stream_;
    const VecI r = (VecI)philox(low, high, seed_);
    // As int32: r where r >= 0, else -r - 1, which is ~r. The factor is that of Triton's uint_to_uniform_float.
    const Vec uniform = __builtin_convertvector(r ^ (r >> 31), Vec) * 4.6566127342e-10f;
    return uniform >= p_;
  }

  // x / (1 - p) where kept, else 0.
  __attribute__((always_inline)) Vec scaled(Vec x, VecI kept) const { return choose(kept, x * scale_, Vec{}); }

  __attribute__((always_inline)) Vec operator()(Vec x, int64_t position, int64_t stride = 1) const {
    return on_ ? scaled(x, kept(position, stride)) : x;
  }

 private:
  bool on_;
  float p_;
  uint64_t seed_;
  uint32_t stream_;
  float scale_;
};

}  // namespace macaron_ops::MACARON_OPS_ISA
