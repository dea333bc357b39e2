// What the CUDA kernels share: code books, block scales, element types.
//
// In headers, so that csrc/tests runs the same lines on the CPU (csrc/tests/cuda_emulation.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "common/codebooks.h"
#include "common/dtype.h"

namespace {

constexpr float kMaxFloat = 3.402823466e38f;

struct Book {
  float value[16];
};
constexpr Book copy_book(const float (&values)[16]) {
  Book book{};
  for (int i = 0; i < 16; ++i) book.value[i] = values[i];
  return book;
}
__constant__ Book kNf4 = copy_book(gp::NF4);

struct Scales {
  const void* scale;     // floats, or uint8 codes where nested != nullptr
  const float* nested;
  const float* offset;
  const float* map;
};

// Each operation rounds on its own: a fused multiply-add would give other bits.
__device__ float double_scale(const Scales& s, uint32_t code, float nested) {
  const float wide = __fadd_rn(__fmul_rn(__ldg(s.map + code), nested), __ldg(s.offset));
  return fminf(wide, kMaxFloat);
}

__device__ float block_scale(const Scales& s, int64_t block) {
  if (s.nested == nullptr) return __ldg(static_cast<const float*>(s.scale) + block);
  return double_scale(s, __ldg(static_cast<const uint8_t*>(s.scale) + block),
                      __ldg(s.nested + block / 256));
}

// 16 bytes that are read once: past the first cache, so that it keeps what is read again.
__device__ uint4 load_once(const uint4* from) {
#if defined(__CUDACC__)
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
#else
  return *from;
#endif
}

__device__ void convert(float x, float* out) { *out = x; }
__device__ void convert(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void convert(float x, __half* out) { *out = __float2half_rn(x); }

// Element i of an array whose type is known at run time.
__device__ float load(const void* from, gp::DType dtype, int64_t i) {
  if (dtype == gp::DType::f32) return __ldg(static_cast<const float*>(from) + i);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(from) + i);
  return dtype == gp::DType::bf16 ? __uint_as_float(uint32_t(bits) << 16)
                                  : __half2float(__ushort_as_half(bits));
}
__device__ void store(float x, void* to, gp::DType dtype, int64_t i) {
  if (dtype == gp::DType::f32) convert(x, static_cast<float*>(to) + i);
  if (dtype == gp::DType::bf16) convert(x, static_cast<__nv_bfloat16*>(to) + i);
  if (dtype == gp::DType::f16) convert(x, static_cast<__half*>(to) + i);
}

}  // namespace
