// nf4 to fp32, bf16 or fp16: streaming, 16-byte loads and stores, the bits of the reference codec.
//
// A warp takes 1024 elements (512 bytes of codes) at a time: one 16-byte load a lane into shared
// memory, from where the lanes take their codes in the order in which 16-byte stores coalesce.
#pragma once

#include "cuda/common.cuh"

namespace {

constexpr int kWarps = 8, kWarpBytes = 512, kWarpElements = 2 * kWarpBytes;

template <class Out>
__global__ void __launch_bounds__(32 * kWarps)
    nf4_dequantize_kernel(const uint8_t* __restrict__ q, Scales scales, int64_t n, int block_shift,
                          Out* __restrict__ out, bool aligned) {
  constexpr int kStep = 16 / sizeof(Out);  // elements of one store
  __shared__ float book[16];
  __shared__ uint4 stage[kWarps][32];
  if (threadIdx.x < 16) book[threadIdx.x] = kNf4.value[threadIdx.x];
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(stage[warp]);
  const int64_t stride = int64_t(gridDim.x) * kWarps * kWarpElements;
  for (int64_t first = (int64_t(blockIdx.x) * kWarps + warp) * kWarpElements; first < n;
       first += stride) {
    if (aligned && first + kWarpElements <= n) {
      stage[warp][lane] = __ldg(reinterpret_cast<const uint4*>(q + first / 2) + lane);
      __syncwarp();
#pragma unroll
      for (int step = 0; step < kWarpElements / (32 * kStep); ++step) {
        const int at = (step * 32 + lane) * kStep;
        const float scale = block_scale(scales, (first + at) >> block_shift);
        alignas(16) Out values[kStep];
#pragma unroll
        for (int i = 0; i < kStep / 2; ++i) {
          const int byte = bytes[at / 2 + i];
          convert(__fmul_rn(book[byte >> 4], scale), &values[2 * i]);
          convert(__fmul_rn(book[byte & 15], scale), &values[2 * i + 1]);
        }
        __stcs(reinterpret_cast<uint4*>(out + first + at), *reinterpret_cast<uint4*>(values));
      }
      __syncwarp();
    } else {
      for (int64_t i = first + lane; i < n && i < first + kWarpElements; i += 32) {
        const int code = q[i / 2] >> (i % 2 ? 0 : 4) & 15;
        convert(__fmul_rn(book[code], block_scale(scales, i >> block_shift)), out + i);
      }
    }
  }
}

}  // namespace
