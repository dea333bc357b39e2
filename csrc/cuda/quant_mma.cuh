// y = x W^T + bias for up to 8 rows of x in bf16 or fp16 and W in int4: on the tensor cores, which
// take the codes less their zero points exactly and sum in float32, so that 8 rows cost what one
// does.
//
// A warp owns 16 rows of W, the left operand, and every eighth step of 128 columns; the eight warps
// of a block are added in their order at the end. In a step a lane reads 16 bytes of rows g and g +
// 8, where g = lane / 4, and the same 32 columns of row g of x: what the instruction wants of it,
// since the order of the columns is free as long as both operands have the same. The sums of a
// step, which has one scale for each row of W, are scaled and added to those of the steps before.
// No sum depends on the number of rows of x.
#pragma once

#include "cuda/quant_matmul.cuh"

namespace {

constexpr int kMmaRows = 16, kMmaWarps = 8, kMmaThreads = 32 * kMmaWarps, kMmaColumns = 128;

// 16-bit types, two in a word. kMagic holds a code in its last bits: 2^kExponent + code.

struct Bf16 {
  static constexpr uint32_t kMagic = 0x43004300u;
  static constexpr float kBase = 128.0f;
  static constexpr bool kSixteenths = false;
  static __device__ uint32_t both(float x) {
    return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(x))) * 0x10001u;
  }
  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#else
    return emulated_fma2<Bf16>(a, b, c);
#endif
  }
#if !defined(__CUDACC__)
  static float value(uint16_t bits) { return gp::GP_ISA::bf16_to_float(bits); }
  static uint16_t bits(float value) { return gp::GP_ISA::float_to_bf16(value); }
#endif
};

struct F16 {
  static constexpr uint32_t kMagic = 0x64006400u;
  static constexpr float kBase = 1024.0f;
  static constexpr bool kSixteenths = true;  // room for a code four bits higher, counted as 16
  static __device__ uint32_t both(float x) {
    return uint32_t(__half_as_ushort(__float2half_rn(x))) * 0x10001u;
  }
  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#else
    return emulated_fma2<F16>(a, b, c);
#endif
  }
#if !defined(__CUDACC__)
  static float value(uint16_t bits) { return gp::GP_ISA::f16_to_float(bits); }
  static uint16_t bits(float value) { return gp::GP_ISA::float_to_f16(value); }
#endif
};

// Adds the product of a (16 rows of W, 16 columns) and b (16 columns, 8 rows of x) to c.
template <class Type>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  if constexpr (Type::kSixteenths)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  emulated_mma<Type>(c, {a0, a1, a2, a3, b0, b1});
#endif
}

// Where a lane reads: its part of step 0 in rows g and g + 8 of W and in row g of x, which is null
// past the last; the number of the first scale of each row of W.
struct Place {
  const uint4* w[2];
  const uint4* x;
  int64_t scale[2];
};

__device__ Place place(const Linear& a, const Weight& w, int64_t first) {
  const int part = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  Place at;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + g + 8 * i < w.n ? first + g + 8 * i : w.n - 1;
    at.w[i] = reinterpret_cast<const uint4*>(w.q + row * w.row_bytes) + part;
    at.scale[i] = row * w.stride;
  }
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + g * w.k + 32 * part;
  at.x = g < a.m ? reinterpret_cast<const uint4*>(x) : nullptr;
  return at;
}

struct Step {
  uint4 w[2], x[4];
  uint32_t scale[2], zero[2];
};

template <bool kZeros>
__device__ void fetch_step(const Weight& w, const Place& at, int64_t step, Step& to) {
  constexpr int kCodes = kMmaColumns / 2 / 16, kX = kMmaColumns * 2 / 16;  // 16 bytes, in a step
  if (step * kMmaColumns >= w.k) return;
  const int64_t group = step * kMmaColumns >> w.group_shift;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    to.w[i] = load_once(at.w[i] + step * kCodes);
    to.scale[i] = raw_scale(w, at.scale[i] + group);
    if (kZeros) to.zero[i] = __ldg(w.zero + at.scale[i] + group);
  }
  if (at.x == nullptr) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) to.x[j] = __ldg(at.x + step * kX + j);
}

// Codes less zero of a word of eight, pair p of columns p and p + 4.
template <class Type>
__device__ void decode_pairs(uint32_t word, float zero, uint32_t (&pair)[4]) {
  const uint32_t one = Type::both(1.0f), base = Type::both(-(Type::kBase + zero));
  if (Type::kSixteenths) {
    const uint32_t sixteenth = Type::both(0.0625f);
    const uint32_t high = Type::both(-(Type::kBase / 16 + zero));
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
      const uint32_t two = word >> 4 * p;
      pair[p] = Type::fma(masked_or(two, 0x000f000fu, Type::kMagic), one, base);
      pair[p + 1] = Type::fma(masked_or(two, 0x00f000f0u, Type::kMagic), sixteenth, high);
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p)
      pair[p] = Type::fma(masked_or(word >> 4 * p, 0x000f000fu, Type::kMagic), one, base);
  }
}

__device__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <class Type, bool kZeros>
__device__ void add_step(const Weight& w, const Step& step, float (&total)[4]) {
  float zero[2], scale[2], c[4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    zero[i] = kZeros ? float(step.zero[i]) : 8.0f;
    scale[i] = float_scale(w, step.scale[i]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t low[4], high[4];
    decode_pairs<Type>(word_of(step.w[0], j), zero[0], low);
    decode_pairs<Type>(word_of(step.w[1], j), zero[1], high);
    const uint4& x = step.x[j];  // columns 0 and 1, 2 and 3, ...: turned to 0 and 4, 1 and 5, ...
    multiply<Type>(c, low[0], high[0], low[1], high[1], __byte_perm(x.x, x.z, 0x5410),
                   __byte_perm(x.x, x.z, 0x7632));
    multiply<Type>(c, low[2], high[2], low[3], high[3], __byte_perm(x.y, x.w, 0x5410),
                   __byte_perm(x.y, x.w, 0x7632));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) total[i] = __fmaf_rn(c[i], scale[i / 2], total[i]);
}

// k is a multiple of 128, and so is the group; q and x begin at multiples of 16 bytes.
template <class Type, bool kZeros>
__global__ void __launch_bounds__(kMmaThreads, 2)
    quant_mma_kernel(const Linear a, const Weight w) {
  __shared__ float sums[kMmaWarps][kMaxBatch][kMmaRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.x) * kMmaRows;
  const Place at = place(a, w, first);
  const int64_t steps = w.k / kMmaColumns;
  float total[4] = {};
  Step even{}, odd{};  // two steps are on their way while nothing is multiplied, one otherwise
  fetch_step<kZeros>(w, at, warp, even);
  fetch_step<kZeros>(w, at, warp + kMmaWarps, odd);
  for (int64_t step = warp; step < steps; step += 2 * kMmaWarps) {
    add_step<Type, kZeros>(w, even, total);
    fetch_step<kZeros>(w, at, step + 2 * kMmaWarps, even);
    if (step + kMmaWarps >= steps) break;
    add_step<Type, kZeros>(w, odd, total);
    fetch_step<kZeros>(w, at, step + 3 * kMmaWarps, odd);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][2 * (lane % 4) + i % 2][lane / 4 + 8 * (i / 2)] = total[i];
  __syncthreads();
  const int m = threadIdx.x / kMmaRows, r = threadIdx.x % kMmaRows;
  if (m >= a.m || first + r >= w.n) return;
  float sum = sums[0][m][r];
#pragma unroll
  for (int i = 1; i < kMmaWarps; ++i) sum = __fadd_rn(sum, sums[i][m][r]);
  finish(a, w.n, first + r, m, sum);
}

}  // namespace
