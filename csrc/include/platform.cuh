// The few things of CUDA that the kernels use, by name: number formats, 16-byte loads, warp exchanges, matrix products.
//
// Everything else in include/ is written on these, so that a test can compile the very same kernels with a plain C++
// compiler: "emulator.h" (in tests/native) supplies the same names and runs blocks and threads in loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define EMO_DEVICE __device__ __forceinline__
#define EMO_HOST_DEVICE __host__ __device__ __forceinline__
#define EMO_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define EMO_SHARED __shared__
#define EMO_PARAMS(type) const __grid_constant__ type

namespace emokernels {

using half_t = __half;
using bf16_t = __nv_bfloat16;

EMO_DEVICE float to_float(float x) { return x; }
EMO_DEVICE float to_float(half_t x) { return __half2float(x); }
EMO_DEVICE float to_float(bf16_t x) { return __bfloat162float(x); }

template <typename T> EMO_DEVICE T from_float(float x);
template <> EMO_DEVICE float from_float<float>(float x) { return x; }
template <> EMO_DEVICE half_t from_float<half_t>(float x) { return __float2half_rn(x); }
template <> EMO_DEVICE bf16_t from_float<bf16_t>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes from memory that nothing writes while the kernel runs; the address is a multiple of 16.
EMO_DEVICE uint4 load16(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

// 16 and 8 bytes to global memory. In PTX, because the compiler takes plain assignments of vectors apart.
EMO_DEVICE void store16(void* address, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(address)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
EMO_DEVICE void store8(void* address, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(address)), "r"(x.x), "r"(x.y)
               : "memory");
}

// x / y to 2 ulp, and 0 where y is beyond 2^126.
EMO_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

// Values read from memory before this are read again after it: keeps a loop from holding shared memory in registers.
EMO_DEVICE void forget_memory() { asm volatile("" ::: "memory"); }

EMO_DEVICE void sync_block() { __syncthreads(); }
EMO_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
EMO_DEVICE uint32_t byte_permute(uint32_t x, uint32_t y, uint32_t selector) { return __byte_perm(x, y, selector); }

// 2^x to 2 ulp, with 2^-inf = 0; results below 2^-126 become 0.
EMO_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Warp-wide instructions are volatile, so that the compiler never moves them into a branch that not all lanes take.

// An 8x8 matrix of 16-bit values, of which lane 4g + t holds row g, columns 2t and 2t + 1: the transpose.
EMO_DEVICE uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d [16 x 8] += a [16 x 16] * b [16 x 8] on the tensor cores; lane 4g + t holds
//   a: rows g, g + 8 of columns 2t, 2t + 1 in a[0], a[1] and of columns 2t + 8, 2t + 9 in a[2], a[3]
//   b: rows 2t, 2t + 1 of column g in b0, rows 2t + 8, 2t + 9 in b1
//   d: columns 2t, 2t + 1 of row g in d[0], d[1] and of row g + 8 in d[2], d[3]
template <typename T> EMO_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> EMO_DEVICE void mma<half_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> EMO_DEVICE void mma<bf16_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace emokernels

#endif

namespace emokernels {

// Element types as the bindings and the tests number them.
enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// How many T fit into 16 bytes.
template <typename T> inline constexpr int kVector = 16 / sizeof(T);

// Two values as one register, the first in the low half.
template <typename T> EMO_DEVICE uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

EMO_DEVICE uint4 zero16() { return uint4{0, 0, 0, 0}; }

// N neighbours of an array, in one access when they fill 16 bytes.
template <typename T, int N> EMO_DEVICE void load_vector(T (&to)[N], const T* from) {
  if constexpr (N == kVector<T>) {
    const uint4 bits = load16(from);
    memcpy(to, &bits, sizeof(bits));
  } else {
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
}
EMO_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Rounds N values and stores them; in one access when they are 16 bytes.
template <typename T, int N> EMO_DEVICE void store_rounded(T* to, const float (&x)[N]) {
  if constexpr (N != kVector<T>) {
    for (int i = 0; i < N; ++i) to[i] = from_float<T>(x[i]);
  } else if constexpr (sizeof(T) == 4) {
    store16(to, uint4{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
  } else {
    store16(to, uint4{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])});
  }
}

EMO_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace emokernels
