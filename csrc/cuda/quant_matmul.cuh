// y = x W^T + bias for up to 8 rows of x, W quantized: as fast as its bytes come.
//
// A warp owns four rows of W. It reads 512 bytes of each at a time, 16 a lane, and asks for the
// next ones before it uses these. x lies in shared memory as float32, a slab of columns at a time,
// in an order in which the 16-byte reads of a warp meet each bank once. Products and sums are
// float32: the 16 or 32 columns of a lane are summed, the sum is scaled and added to that of the
// lanes' other columns, and the 32 lanes are added pairwise at the end. No sum depends on the
// number of rows.
#pragma once

#include "cuda/quant_formats.cuh"

namespace {

constexpr int kRows = 4;     // of W, side by side in a warp
constexpr int kMaxBatch = 8;  // rows of x

// What surrounds the weight: x (m, k), y (m, n), and bias (n) or null.
struct Linear {
  const void* x;
  const void* bias;
  void* y;
  int m;
  gp::DType dtype, bias_dtype;
};

constexpr int kGemvWarps = 4, kGemvThreads = 32 * kGemvWarps;

// For M rows of x. Many make so much work of each chunk that the other warps hide its loads: it is
// asked for after the one before, whose registers it takes.
template <int M>
struct Plan {
  static constexpr bool kAhead = M <= 2;
  static constexpr int kBlocks = M <= 2 ? 4 : M == 4 ? 3 : 2;  // on a processor, at least
  static constexpr int kTiles = M <= 2 ? 4 : 8 / M;  // in a slab; a tile is a chunk for each lane
};

// 16 bytes of one row, as read; decoded only when used, so that nothing waits for them earlier.
struct Chunk {
  uint32_t q[4];
  uint32_t scale;  // its bits, or its code
  float extra;     // zero point, or nested scale
};

// Chunk number `chunk` of rows `first` and following; rows past the last are the last again.
template <class Format>
__device__ void fetch(const Weight& w, int64_t first, int64_t chunk, Chunk (&to)[kRows]) {
  const int64_t column = chunk * Format::kColumns;
  if (column >= w.k) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = Chunk{};
    return;
  }
  int64_t at[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < w.n ? first + r : w.n - 1;
    const uint4 q = load_once(reinterpret_cast<const uint4*>(w.q + row * w.row_bytes) + chunk);
    to[r].q[0] = q.x, to[r].q[1] = q.y, to[r].q[2] = q.z, to[r].q[3] = q.w;
    at[r] = Format::kBook ? (row * w.k + column) >> w.group_shift
                          : (row >> w.row_shift) * w.stride + (column >> w.group_shift);
  }
  if (Format::kBook && w.scales.nested != nullptr) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      to[r].scale = __ldg(static_cast<const uint8_t*>(w.scales.scale) + at[r]);
      to[r].extra = __ldg(w.scales.nested + at[r] / 256);
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r].scale = raw_scale(w, at[r]);
  }
  if (Format::kZeroPoints) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r].extra = float(__ldg(w.zero + at[r]));
  }
}

template <class Format>
__device__ float scale_of(const Weight& w, const Chunk& chunk) {
  if (Format::kBook && w.scales.nested != nullptr)
    return double_scale(w.scales, chunk.scale, chunk.extra);
  return float_scale(w, chunk.scale);
}

__device__ float4 widen(float4 x, gp::DType) { return x; }
__device__ float4 widen(uint2 x, gp::DType dtype) {
  if (dtype == gp::DType::bf16)
    return {__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u),
            __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u)};
  return {__half2float(__ushort_as_half(uint16_t(x.x))),
          __half2float(__ushort_as_half(uint16_t(x.x >> 16))),
          __half2float(__ushort_as_half(uint16_t(x.y))),
          __half2float(__ushort_as_half(uint16_t(x.y >> 16)))};
}

// Columns `first` and following of x, `tiles` tiles, zero past the ends. The four columns 4 * quad
// of lane's part of a tile go where the banks of `lane ^ quad` are: neither the threads that write
// here nor those that read in the product share one. Four: four elements of x as they lie in
// memory.
template <class Four, int kQuads, int M>
__device__ void stage(const Linear& a, int64_t k, int64_t first, int tiles,
                      float4 (*to)[M][kQuads][32]) {
  const Four* x = static_cast<const Four*>(a.x) + first / 4;
  const int64_t fours = (k - first) / 4, stride = k / 4;
  for (int i = threadIdx.x; i < tiles * kQuads * 32; i += kGemvThreads) {
    const int quad = i % kQuads, lane = i / kQuads % 32, tile = i / kQuads / 32;
    Four four[M] = {};
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (m < a.m && i < fours) four[m] = __ldg(x + m * stride + i);
#pragma unroll
    for (int m = 0; m < M; ++m) to[tile][m][quad][lane ^ quad] = widen(four[m], a.dtype);
  }
}

// The sum of each of the values over the 32 lanes, in an order that their number does not change:
// half of them go to the lane 16 away, which sends the other half, and so on. Lane l returns sum
// number l / (32 / kValues).
template <int kValues>
__device__ float sum_lanes(float (&v)[kValues]) {
  const int lane = threadIdx.x % 32;
  int live = kValues;
#pragma unroll
  for (int away = 16; away > 0; away /= 2) {
    if (live > 1) {
      live /= 2;
      const bool upper = lane & away;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i < live) {
          const float keep = upper ? v[live + i] : v[i], give = upper ? v[i] : v[live + i];
          v[i] = __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, give, away));
        }
      }
    } else {
      v[0] = __fadd_rn(v[0], __shfl_xor_sync(0xffffffffu, v[0], away));
    }
  }
  return v[0];
}

__device__ void finish(const Linear& a, int64_t n, int64_t row, int m, float sum) {
  if (a.bias != nullptr) sum = __fadd_rn(sum, load(a.bias, a.bias_dtype, row));
  store(sum, a.y, a.dtype, m * n + row);
}

// Whole chunks only: k is a multiple of Format::kColumns, q and x begin at multiples of 16 bytes,
// and no chunk has two scales.
template <class Format, int M>
__global__ void __launch_bounds__(kGemvThreads, Plan<M>::kBlocks)
    quant_matmul_kernel(const Linear a, const Weight w) {
  constexpr int kQuads = Format::kColumns / 4, kTiles = Plan<M>::kTiles;
  __shared__ float4 x[kTiles][M][kQuads][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (int64_t(blockIdx.x) * kGemvWarps + warp) * kRows;
  const int tiles = int((w.k + Format::kColumns * 32 - 1) / (Format::kColumns * 32));
  Chunk next[kRows];
  fetch<Format>(w, first, lane, next);
  const float book = Format::kBook ? book_value(w.format, lane % 16) : 0.0f;

  float total[M * kRows] = {};
  for (int slab = 0; slab < tiles; slab += kTiles) {
    const int here = tiles - slab < kTiles ? tiles - slab : kTiles;
    if (slab > 0) __syncthreads();
    const int64_t column = int64_t(slab) * Format::kColumns * 32;
    if (a.dtype == gp::DType::f32)
      stage<float4, kQuads, M>(a, w.k, column, here, x);
    else
      stage<uint2, kQuads, M>(a, w.k, column, here, x);
    __syncthreads();
    for (int tile = 0; tile < here; ++tile) {
      Chunk now[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) now[r] = next[r];
      const int64_t ahead = int64_t(slab + tile + 1) * 32 + lane;
      if (Plan<M>::kAhead) fetch<Format>(w, first, ahead, next);
      float sum[M * kRows] = {};
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        float value[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          Format::decode(now[r].q, i, now[r].extra, book, value[r]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float4 v = x[tile][m][i][lane ^ i];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float s = __fmaf_rn(v.x, value[r][0], sum[m * kRows + r]);
            s = __fmaf_rn(v.y, value[r][1], s);
            s = __fmaf_rn(v.z, value[r][2], s);
            sum[m * kRows + r] = __fmaf_rn(v.w, value[r][3], s);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = scale_of<Format>(w, now[r]);
#pragma unroll
        for (int m = 0; m < M; ++m)
          total[m * kRows + r] = __fmaf_rn(sum[m * kRows + r], scale, total[m * kRows + r]);
      }
      if (!Plan<M>::kAhead) fetch<Format>(w, first, ahead, next);
    }
  }
  const float sum = sum_lanes(total);
  constexpr int kHolders = 32 / (M * kRows);  // lanes that hold the same sum
  const int value = lane / kHolders, m = value / kRows;
  const int64_t row = first + value % kRows;
  if (lane % kHolders == 0 && m < a.m && row < w.n) finish(a, w.n, row, m, sum);
}

// Any shape, a warp for each row of W, weight by weight.
__global__ void __launch_bounds__(kGemvThreads)
    quant_matmul_narrow_kernel(const Linear a, const Weight w) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kGemvWarps + threadIdx.x / 32;
  if (row >= w.n) return;
  float total[kMaxBatch] = {};
  for (int64_t column = lane; column < w.k; column += 32) {
    const float value = weight_at(w, row, column);
#pragma unroll
    for (int m = 0; m < kMaxBatch; ++m)
      if (m < a.m) total[m] = __fmaf_rn(load(a.x, a.dtype, m * w.k + column), value, total[m]);
  }
  const float sum = sum_lanes(total);
  constexpr int kHolders = 32 / kMaxBatch;
  if (lane % kHolders == 0 && lane / kHolders < a.m) finish(a, w.n, row, lane / kHolders, sum);
}

}  // namespace
