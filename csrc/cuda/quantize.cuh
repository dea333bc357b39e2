// fp32, bf16 or fp16 to int8, fp8 and 4-bit codes of a book: the bits of the reference codecs.
//
// A segment, elements of a row that share a scale, belongs to as many lanes as need one 16-byte
// load each, or to a whole block that goes along it twice: first for its largest magnitude, then,
// out of the caches, for its codes.
#pragma once

#include "cuda/quant_formats.cuh"

namespace {

constexpr int kQuantizeThreads = 256;

// Rows of k elements in segments of `width`, the last of a row may be shorter; `count` segments.
struct Segments {
  int64_t count, k, width, per_row;
  int team;    // threads of a segment: a power of two up to 32, or kQuantizeThreads
  bool whole;  // every row begins at a multiple of 16 bytes, its codes at one of what is stored
};

// What a code is made with: the scale of a segment and its code for one element. limit: the
// largest magnitude of an fp8 format. last: a shorter segment of 4-bit codes.

struct Int8Code {
  static constexpr int kBits = 8;
  static constexpr bool kBook = false;
  float lift, factor, scale;
  __device__ Int8Code(float absmax, float, bool, const float*, uint64_t) {
    // 127 / absmax leaves fp32 below this, so the row is first multiplied by 2^64: exactly.
    lift = absmax < 1.504632769e-36f ? 18446744073709551616.0f : 1.0f;
    factor = absmax > 0.0f ? __fmul_rn(__fdiv_rn(1.0f, __fmul_rn(absmax, lift)), 127.0f) : 0.0f;
    scale = __fdiv_rn(absmax, 127.0f);
  }
  __device__ uint32_t operator()(float x) const {
    return uint32_t(__float2int_rn(__fmul_rn(__fmul_rn(x, lift), factor))) & 255;
  }
};

// kMantissa bits of mantissa; the smallest normal number is 2^kLowest. Infinities saturate, NaN
// stays.
template <int kMantissa, int kLowest>
struct Fp8Code {
  static constexpr int kBits = 8;
  static constexpr bool kBook = false;
  float scale, limit;
  __device__ Fp8Code(float absmax, float limit, bool, const float*, uint64_t) : limit(limit) {
    scale = fmaxf(__fdiv_rn(absmax, limit), __uint_as_float(0x00800000u));  // the smallest normal
  }
  __device__ uint32_t operator()(float x) const {
    const uint32_t sign = __float_as_uint(x) >> 24 & 128;
    if (x != x) return sign | 127;
    const float v = fminf(fabsf(__fdiv_rn(x, scale)), limit);
    const int field = int(__float_as_uint(v) >> 23) - 127;
    const int exponent = field > kLowest ? field : kLowest;
    // Steps of 2^(exponent - kMantissa) are counted: a full count carries into the exponent.
    const float steps = __uint_as_float(uint32_t(127 + kMantissa - exponent) << 23);
    const int count = __float2int_rn(__fmul_rn(v, steps));
    return sign | uint32_t(((exponent - kLowest) << kMantissa) + count);
  }
};

struct BookCode {
  static constexpr int kBits = 4;
  static constexpr bool kBook = true;
  const float* bound;  // the 15 midpoints between neighbours, rising
  uint64_t order;      // the code of each place, 4 bits each
  float scale, inverse;
  bool last;
  __device__ BookCode(float absmax, float, bool last, const float* bound, uint64_t order)
      : bound(bound), order(order), last(last) {
    const float floored = fmaxf(absmax, 1e-38f);
    // bitsandbytes' way with a last shorter block: the floor is in the scale, which divides.
    scale = last ? floored : absmax;
    inverse = last ? floored : __fdiv_rn(1.0f, floored);
  }
  __device__ uint32_t operator()(float x) const {
    const float t = last ? __fdiv_rn(x, inverse) : __fmul_rn(x, inverse);
    int place = 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2)
      if (t > bound[place + step - 1]) place += step;
    return uint32_t(order >> 4 * place) & 15;
  }
};

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) {
  return __uint_as_float(uint32_t(__bfloat16_as_ushort(x)) << 16);
}
__device__ float widen(__half x) { return __half2float(x); }

// Elements of 16 bytes, zeros from `left` on.
template <class In, int kRun>
__device__ void load_run(const In* x, int64_t left, bool whole, float (&out)[kRun]) {
  if (whole) {
    alignas(16) In values[kRun];
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(x));
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = widen(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = i < left ? widen(x[i]) : 0.0f;
  }
}

// Their codes: 4 bits each, the even element high, or 8.
template <class Code, int kRun>
__device__ void store_run(const Code& code, const float (&x)[kRun], int64_t left, bool whole,
                          uint8_t* q) {
  constexpr int kBytes = kRun * Code::kBits / 8;
  alignas(8) uint8_t bytes[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if constexpr (Code::kBook) bytes[i] = uint8_t(code(x[2 * i]) << 4 | code(x[2 * i + 1]));
    else bytes[i] = uint8_t(code(x[i]));
  }
  if (whole) {
    if (kBytes == 8) *reinterpret_cast<uint2*>(q) = *reinterpret_cast<uint2*>(bytes);
    if (kBytes == 4) *reinterpret_cast<uint32_t*>(q) = *reinterpret_cast<uint32_t*>(bytes);
    if (kBytes == 2) *reinterpret_cast<uint16_t*>(q) = *reinterpret_cast<uint16_t*>(bytes);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i)
      if (i * 8 / Code::kBits < left) q[i] = bytes[i];
  }
}

// The largest of what a team's threads bring, to each of them.
__device__ float team_max(float x, int team) {
  for (int mask = (team < 32 ? team : 32) / 2; mask > 0; mask /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  if (team <= 32) return x;
  __shared__ float largest[kQuantizeThreads / 32];
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuantizeThreads / 32; ++i) x = fmaxf(x, largest[i]);
  return x;
}

// q null: only the largest finite magnitude of each segment, into scale. given: that of all
// segments, which then share scale[0].
template <class Code, class In>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_kernel(const In* __restrict__ x, Segments s, float limit, bool fp4, uint64_t order,
                    const float* given, uint8_t* __restrict__ q, float* __restrict__ scale) {
  constexpr int kRun = 16 / sizeof(In);
  __shared__ float bound[16];
  if (Code::kBook) {
    if (threadIdx.x < 15) {
      const int i = int(threadIdx.x);
      const WeightFormat format = fp4 ? WeightFormat::fp4 : WeightFormat::nf4;
      const auto value = [&](int at) { return book_value(format, int(order >> 4 * at) & 15); };
      bound[i] = __fmul_rn(__fadd_rn(value(i), value(i + 1)), 0.5f);
    }
    __syncthreads();
  }
  const int64_t segment = int64_t(blockIdx.x) * (kQuantizeThreads / s.team) + threadIdx.x / s.team;
  const bool there = segment < s.count;  // the others' lanes still take part in shuffles
  const int64_t row = there ? segment / s.per_row : 0;
  const int64_t column = there ? (segment - row * s.per_row) * s.width : 0;
  const int64_t left = s.k - column < s.width ? s.k - column : s.width;
  const int64_t length = there ? left : 0, first = row * s.k + column;
  const int begin = int(threadIdx.x % s.team) * kRun, stride = s.team * kRun;
  float values[kRun] = {};
  float absmax = 0.0f;
  if (given == nullptr) {
    for (int64_t i = begin; i < length; i += stride) {
      load_run(x + first + i, length - i, s.whole && length - i >= kRun, values);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float magnitude = fabsf(values[j]);
        if (magnitude <= kMaxFloat) absmax = fmaxf(absmax, magnitude);
      }
    }
    absmax = team_max(absmax, s.team);
  } else {
    absmax = __ldg(given);
  }
  if (!there) return;
  const Code code(absmax, limit, length < s.width, bound, order);
  if (begin == 0 && (given == nullptr || segment == 0))
    scale[given == nullptr ? segment : 0] = q == nullptr ? absmax : code.scale;
  if (q == nullptr) return;
  for (int64_t i = begin; i < length; i += stride) {
    const bool whole = s.whole && length - i >= kRun;
    load_run(x + first + i, length - i, whole, values);
    store_run(code, values, length - i, whole, q + (first + i) * Code::kBits / 8);
  }
}

}  // namespace
