// cp.async, ldmatrix and mma.sync as PTX's manual describes them, for fibers. When a copy arrives: grid.h.
#pragma once

#include <type_traits>

#include "cuda.h"

namespace cuda_on_host {

inline void copy_async(void* shared, const void* global, bool inside) {
  if (uintptr_t(shared) % 16 != 0 || uintptr_t(global) % 16 != 0) fail("cp.async of 16 bytes at an address that is no multiple of 16");
  const Copy copy{shared, inside ? global : nullptr, current()->groups};
  if (block().copy_is_early()) copy.arrive();
  else current()->copies.push_back(copy);
}
inline void copies_commit() { ++current()->groups; }
template <int N>
void copies_wait() {
  std::vector<Copy>& copies = current()->copies;
  const auto late = [](const Copy& c) { return c.group + N >= current()->groups; };
  for (const Copy& c : copies)
    if (!late(c)) c.arrive();
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const Copy& c) { return !late(c); }), copies.end());
}

inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (uintptr_t(row) % 16 != 0) fail("ldmatrix of a row that does not begin at a multiple of 16 bytes");
  const auto rows = exchange(~0u, &row, sizeof row, {file, line});
  for (int m = 0; m < 4; ++m)
    for (int half = 0; half < 2; ++half) {
      const int i = lane() / 4, j = lane() % 4 * 2 + half;
      const char* from;
      std::memcpy(&from, rows[m * 8 + (transposed ? j : i)], sizeof from);
      std::memcpy(reinterpret_cast<char*>(&out[m]) + half * 2, from + (transposed ? i : j) * 2, 2);
    }
}

// Sums in float32, in the order of k: a GPU's order is not told.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = exchange(~0u, mine, sizeof mine, {file, line});
  const auto element = [&](int lane, int reg, int half) {
    T value;
    std::memcpy(&value, all[lane] + reg * 4 + half * 2, 2);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
    else return __half2float(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
}

}  // namespace cuda_on_host
