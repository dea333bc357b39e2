// Quantized weights to fp32, bf16 or fp16: streaming, 16-byte loads and stores, the bits of the
// reference codecs.
//
// A warp takes 512 bytes of codes at a time: one 16-byte load a lane into shared memory, from where
// the lanes take their codes in the order in which 16-byte stores coalesce.
#pragma once

#include "cuda/quant_formats.cuh"

namespace {

constexpr int kWarps = 8;

// Rows of int4 are not padded, and no 16-byte store crosses a row's or a group's end.
inline bool whole_runs(const Weight& w, const void* out) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(w.q) | reinterpret_cast<uintptr_t>(out);
  const bool book = w.format == WeightFormat::nf4 || w.format == WeightFormat::fp4;
  return places % 16 == 0 && (book || (w.k % 8 == 0 && w.k < int64_t(1) << 31));
}

// As many weights as one store takes, from element `at` of the warp's codes on.
template <class Format, int kRun>
__device__ void decode_run(const uint4* stage, int at, float zero, float value,
                           float (&out)[kRun]) {
  constexpr int kBytes = kRun * 16 / Format::kColumns;
  uint32_t q[4] = {};
  if (kBytes == 2) {
    q[0] = reinterpret_cast<const uint16_t*>(stage)[at / kRun];
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i)
      q[i] = reinterpret_cast<const uint32_t*>(stage)[at / kRun * (kBytes / 4) + i];
  }
#pragma unroll
  for (int i = 0; i < kRun / 4; ++i) {
    float four[4];
    Format::decode(q, i, zero, value, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[4 * i + j] = four[j];
  }
}

// The first `tiles` times 512 bytes of codes, where whole_runs(w, out).
template <class Format, class Out>
__global__ void __launch_bounds__(32 * kWarps, 8)  // 2048 threads on a multiprocessor
    dequantize_kernel(Weight w, int64_t tiles, Out* __restrict__ out) {
  constexpr int kRun = 16 / sizeof(Out);  // elements of one store
  constexpr int kTile = 32 * Format::kColumns;
  __shared__ uint4 stages[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4* stage = stages[warp];
  const float value = Format::kBook ? book_value(w.format, lane % 16) : 0.0f;
  for (int64_t tile = int64_t(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += int64_t(gridDim.x) * kWarps) {
    const int64_t first = tile * kTile;
    stage[lane] = load_once(reinterpret_cast<const uint4*>(w.q) + tile * 32 + lane);
    __syncwarp();
    // Divided once in 64 bits, then in 32.
    const int64_t row = Format::kBook ? 0 : first / w.k;
    const uint32_t column = Format::kBook ? 0 : uint32_t(first - row * w.k);
#pragma unroll
    for (int step = 0; step < kTile / (32 * kRun); ++step) {
      const int at = (step * 32 + lane) * kRun;
      float scale, zero = 0.0f;
      if (Format::kBook) {
        scale = block_scale(w.scales, (first + at) >> w.group_shift);
      } else {
        const uint32_t rows = (column + uint32_t(at)) / uint32_t(w.k);
        const uint32_t group = (column + uint32_t(at) - rows * uint32_t(w.k)) / uint32_t(w.group);
        const int64_t number = ((row + rows) >> w.row_shift) * w.stride + group;
        scale = float_scale(w, raw_scale(w, number));
        if (Format::kZeroPoints) zero = float(__ldg(w.zero + number));
      }
      float weights[kRun];
      decode_run<Format>(stage, at, zero, value, weights);
      alignas(16) Out values[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) convert(__fmul_rn(weights[i], scale), &values[i]);
      __stcs(reinterpret_cast<uint4*>(out + first + at), *reinterpret_cast<uint4*>(values));
    }
    __syncwarp();
  }
}

// Elements from `first` on, of any shape.
template <class Out>
__global__ void __launch_bounds__(32 * kWarps)
    dequantize_any_kernel(Weight w, int64_t first, Out* __restrict__ out) {
  const int64_t count = w.n * w.k, stride = int64_t(gridDim.x) * 32 * kWarps;
  for (int64_t i = first + int64_t(blockIdx.x) * 32 * kWarps + threadIdx.x; i < count; i += stride)
    convert(weight_at(w, i / w.k, i % w.k), out + i);
}

}  // namespace
