// Quantized weights as quant_matmul.cuh reads them: 16 bytes of codes to floats, exactly.
//
// A code becomes a float by being put into the last bits of the significand of 2^e, from which 2^e
// is subtracted again: one bit operation and one addition, where a conversion takes a slower unit.
#pragma once

#include "cuda/common.cuh"

namespace {

__constant__ Book kFp4 = copy_book(gp::FP4);

// As genai_perf/ops/quant_matmul/components.py numbers them.
enum class WeightFormat : int { int8 = 0, e4m3 = 1, e5m2 = 2, nf4 = 3, int4 = 4, fp4 = 5 };

// The scale of row r, column c is number (r >> row_shift) * stride + c / group, with the code books
// (r * k + c) / group.
struct Weight {
  WeightFormat format;
  const uint8_t* q;
  Scales scales;
  gp::DType scale_dtype;
  const uint8_t* zero;  // null: 8
  int64_t n, k, row_bytes, stride, group;
  int row_shift, group_shift;  // group = 1 << group_shift, where a wide kernel runs
};

// The bits of a scale that is no code of the dynamic map, as read; a float of them when it is used.
__device__ uint32_t raw_scale(const Weight& w, int64_t at) {
  if (w.scale_dtype == gp::DType::f32)
    return __ldg(static_cast<const uint32_t*>(w.scales.scale) + at);
  return __ldg(static_cast<const uint16_t*>(w.scales.scale) + at);
}
__device__ float float_scale(const Weight& w, uint32_t raw) {
  if (w.scale_dtype == gp::DType::f32) return __uint_as_float(raw);
  return w.scale_dtype == gp::DType::bf16 ? __uint_as_float(raw << 16)
                                          : __half2float(__ushort_as_half(uint16_t(raw)));
}

// (word & mask) | bits by one instruction: left alone, ptxas makes two of them.
__device__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
#else
  return (word & mask) | bits;
#endif
}

// decode(): four weights before they are scaled, columns 4i to 4i + 3 of a lane's 16 bytes q.
// kColumns: weights in 16 bytes. kBook: the scale's number counts elements of the whole tensor, and
// each lane brings value number lane % 16 of the book.

template <bool kZeros>
struct Int4 {
  static constexpr int kColumns = 32;
  static constexpr bool kBook = false, kZeroPoints = kZeros;
  static __device__ void decode(const uint32_t (&q)[4], int i, float zero, float,
                                float (&out)[4]) {
    const uint32_t word = i % 2 ? q[i / 2] >> 16 : q[i / 2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // the code stands at bit 4j: in 2^(23 - 4j) it counts as 1
      const uint32_t magic = uint32_t(150 - 4 * j) << 23;
      const float base = float(1 << (23 - 4 * j)) + (kZeros ? zero : 8.0f);
      out[j] = __fsub_rn(__uint_as_float(masked_or(word, 15u << 4 * j, magic)), base);
    }
  }
};

struct Book4 {
  static constexpr int kColumns = 32;
  static constexpr bool kBook = true, kZeroPoints = false;
  static __device__ void decode(const uint32_t (&q)[4], int i, float, float value,
                                float (&out)[4]) {
    // The even element is the high nibble. A shuffle looks at 5 bits, of which the book needs 4:
    // lanes 16 apart bring the same value.
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out[j] = __shfl_sync(0xffffffffu, value, q[i / 2] >> (16 * (i % 2) + 4 * (j ^ 1)));
  }
};

struct Int8 {
  static constexpr int kColumns = 16;
  static constexpr bool kBook = false, kZeroPoints = false;
  static __device__ void decode(const uint32_t (&q)[4], int i, float, float,
                                float (&out)[4]) {
    const uint32_t biased = q[i] ^ 0x80808080u;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out[j] = __fsub_rn(__uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 | j)), 8388736.0f);
  }
};

// fp8 codes moved to the places of float32's fields, whose larger bias a product takes away; that
// is exact for subnormals too. Codes that are not finite are put right afterwards.
template <bool kE5m2>
struct Fp8 {
  static constexpr int kColumns = 16;
  static constexpr bool kBook = false, kZeroPoints = false;
  static __device__ void decode(const uint32_t (&q)[4], int i, float, float,
                                float (&out)[4]) {
    constexpr int kPlace = kE5m2 ? 21 : 20;                 // of the lowest bit of the code
    constexpr uint32_t kSpecial = kE5m2 ? 0x7c : 0x7f;      // the first magnitude not finite
    const float bias = __uint_as_float(kE5m2 ? 0x77800000u : 0x7b800000u);  // 2^112, 2^120
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t sign = q[i] << (24 - 8 * j) & 0x80000000u;
      const uint32_t wide =
          8 * j < kPlace ? q[i] << (kPlace - 8 * j) : q[i] >> (8 * j - kPlace);
      const uint32_t magnitude = wide & (0x7fu << kPlace);
      // As float32: infinity, or NaN by bits of the significand.
      const uint32_t special = kE5m2 ? magnitude | 0x7f800000u : 0x7fffffffu;
      const float finite = __fmul_rn(__uint_as_float(sign | magnitude), bias);
      out[j] = magnitude >= kSpecial << kPlace ? __uint_as_float(sign | special) : finite;
    }
  }
};

__device__ float book_value(WeightFormat format, int code) {
  return (format == WeightFormat::fp4 ? kFp4 : kNf4).value[code];
}

// One weight with its scale, for any shape.
__device__ float weight_at(const Weight& w, int64_t row, int64_t column) {
  const WeightFormat format = w.format;
  if (format == WeightFormat::nf4 || format == WeightFormat::fp4) {
    const int64_t at = row * w.k + column;
    const int code = __ldg(w.q + at / 2) >> (at % 2 ? 0 : 4) & 15;
    return __fmul_rn(book_value(format, code), block_scale(w.scales, at / w.group));
  }
  const int64_t block = (row >> w.row_shift) * w.stride + column / w.group;
  const float scale = load(w.scales.scale, w.scale_dtype, block);
  float value[4];
  if (format == WeightFormat::int4) {
    const int code = __ldg(w.q + row * w.row_bytes + column / 2) >> (column % 2 ? 4 : 0) & 15;
    value[0] = float(code - (w.zero == nullptr ? 8 : int(__ldg(w.zero + block))));
  } else {
    const uint32_t q[4] = {__ldg(w.q + row * w.row_bytes + column), 0, 0, 0};
    if (format == WeightFormat::int8) Int8::decode(q, 0, 0.0f, 0.0f, value);
    if (format == WeightFormat::e4m3) Fp8<false>::decode(q, 0, 0.0f, 0.0f, value);
    if (format == WeightFormat::e5m2) Fp8<true>::decode(q, 0, 0.0f, 0.0f, value);
  }
  return __fmul_rn(value[0], scale);
}

}  // namespace
