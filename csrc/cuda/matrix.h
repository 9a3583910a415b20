// The instructions of matrix products on sm_80 and later, each behind one function: real ones for nvcc, what PTX's manual
// says of them for g++ (host/matrix.h).
#pragma once

#include "device.h"

#ifdef MACARON_OPS_CUDA_ON_HOST
#include "host/matrix.h"
#endif

namespace macaron_ops::cuda {

// Four 8x8 matrices of 16-bit numbers, or a fragment of A (16x16): registers of one lane.
struct Fragment {
  uint32_t at[4];
};

#ifdef MACARON_OPS_CUDA_ON_HOST

using cuda_on_host::copy_async;
using cuda_on_host::copies_commit;
using cuda_on_host::copies_wait;
inline void load_matrices(Fragment& f, const void* row) { cuda_on_host::load_matrices(f.at, row, false); }
inline void load_transposed(Fragment& f, const void* row) { cuda_on_host::load_matrices(f.at, row, true); }
template <class T>
void multiply_add(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  cuda_on_host::multiply_add<T>(c, a.at, b);
}

#else

MACARON_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, there after a wait and a barrier; zeros where `inside` is false.
MACARON_DEVICE void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
MACARON_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// All groups but the last N that this thread has committed are there.
template <int N>
MACARON_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Lane l names row l % 8 of matrix l / 8, 16 bytes; it gets elements 2 (l % 4) and the next one of row l / 4 of each.
MACARON_DEVICE void load_matrices(Fragment& f, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(f.at[0]), "=r"(f.at[1]), "=r"(f.at[2]), "=r"(f.at[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of each matrix transposed.
MACARON_DEVICE void load_transposed(Fragment& f, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(f.at[0]), "=r"(f.at[1]), "=r"(f.at[2]), "=r"(f.at[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16x8) += a (16x16) b (16x8). Lane l has of c rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one.
template <class T>
MACARON_DEVICE void multiply_add(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, bf16))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace macaron_ops::cuda
