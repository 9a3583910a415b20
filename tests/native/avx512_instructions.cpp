// Instructions of AVX-512 by their intrinsics, for tests/native/test_emulation.py: 16 numbers at a time.
#include <immintrin.h>

#include <cstdint>

namespace {
constexpr __mmask16 kAll = 0xffff;
__m512 load(const float* p) { return _mm512_maskz_loadu_ps(kAll, p); }
void store(float* p, __m512 v) { _mm512_mask_storeu_ps(p, kAll, v); }
}  // namespace

extern "C" {

void scalef(const float* x, const float* n, float* out) { store(out, _mm512_maskz_scalef_ps(kAll, load(x), load(n))); }
void rest_of_nearest(const float* x, float* out) { store(out, _mm512_maskz_reduce_ps(kAll, load(x), 0)); }
void rest_of_lower(const float* x, float* out) { store(out, _mm512_maskz_reduce_ps(kAll, load(x), 1)); }
void dot(const float* sum, const uint16_t* a, const uint16_t* b, float* out) {
  store(out, _mm512_dpbf16_ps(load(sum), (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b)));
}
void part(const float* x, const uint16_t* halves, uint32_t mask, float* floats, uint16_t* narrow, uint32_t* wide) {
  const __mmask16 some = __mmask16(mask);
  const __m512 v = _mm512_maskz_loadu_ps(some, x);
  _mm512_mask_storeu_ps(floats, some, v);
  _mm512_mask_cvtepi32_storeu_epi16(narrow, some, (__m512i)v);
  _mm512_mask_storeu_epi32(wide, some, _mm512_maskz_cvtepu16_epi32(some, _mm256_maskz_loadu_epi16(some, halves)));
}

}
