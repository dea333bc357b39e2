// Launching quant_matmul.cuh.
#include "cuda/quant_matmul.cuh"

#include "cuda/launch.h"
#include "cuda/quant_mma.cuh"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Format, int M>
void launch(const Linear& a, const Weight& w, cudaStream_t stream) {
  GP_LAUNCH((quant_matmul_kernel<Format, M>), unsigned(ceil_div(w.n, kRows * kGemvWarps)),
            kGemvThreads, stream, a, w);
}

template <class Format>
void launch(const Linear& a, const Weight& w, bool wide, cudaStream_t stream) {
  if (!wide || w.k % Format::kColumns != 0) {
    GP_LAUNCH(quant_matmul_narrow_kernel, unsigned(ceil_div(w.n, kGemvWarps)),
              kGemvThreads, stream, a, w);
  } else if (a.m == 1) {
    launch<Format, 1>(a, w, stream);
  } else if (a.m == 2) {
    launch<Format, 2>(a, w, stream);
  } else if (a.m <= 4) {
    launch<Format, 4>(a, w, stream);
  } else {
    launch<Format, 8>(a, w, stream);
  }
}

template <bool kZeros>
void launch_int4(const Linear& a, const Weight& w, bool wide, cudaStream_t stream) {
  const unsigned blocks = unsigned(ceil_div(w.n, kMmaRows));
  const bool steps = wide && w.k % kMmaColumns == 0 && w.group % kMmaColumns == 0;
  if (!steps || a.dtype == gp::DType::f32) {
    launch<Int4<kZeros>>(a, w, wide, stream);
  } else if (a.dtype == gp::DType::bf16) {
    GP_LAUNCH((quant_mma_kernel<Bf16, kZeros>), blocks, kMmaThreads, stream, a, w);
  } else {
    GP_LAUNCH((quant_mma_kernel<F16, kZeros>), blocks, kMmaThreads, stream, a, w);
  }
}

}  // namespace

// y (m, n) = x (m, k) W^T + bias. All pointers are device memory, and trusted; q and x must begin
// at multiples of 16 bytes.
//   m: 1 to 8, n and k: at least 1. dtype: of x and y; bias may be null.
//   scale: of scale_dtype, or uint8 codes where nested, offset and map are not null.
//   group: columns that share a scale; with a code book, elements of the whole tensor.
//   block_rows: rows that share one, a power of two or all n. stride: scales of a row.
// Returns a cudaError_t.
GP_EXPORT int gp_cuda_quant_matmul(int format, int64_t n, int64_t k, const uint8_t* q,
                                   const void* scale, int scale_dtype, const uint8_t* zero,
                                   const float* nested, const float* offset, const float* map,
                                   int64_t group, int64_t block_rows, int64_t stride,
                                   const void* x, int m, int dtype, const void* bias,
                                   int bias_dtype, void* y, int device, void* stream) {
  if (m < 1 || m > kMaxBatch || n < 1 || k < 1 || group < 1 || block_rows < 1)
    return cudaErrorInvalidValue;
  if ((reinterpret_cast<uintptr_t>(q) | reinterpret_cast<uintptr_t>(x)) % 16 != 0)
    return cudaErrorMisalignedAddress;
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  const bool book = format == int(WeightFormat::nf4) || format == int(WeightFormat::fp4);
  constexpr int64_t kAll = int64_t(1) << 48;  // a power of two beyond any k and n
  if (!book && group >= k) group = kAll;
  if (block_rows >= n) block_rows = kAll;
  const Linear a{x, bias, y, m, gp::DType(dtype), gp::DType(bias_dtype)};
  Weight w{WeightFormat(format), q, {scale, nested, offset, map}, gp::DType(scale_dtype),
           zero, n, k, 0, stride, group, 0, 0};
  w.row_bytes = book ? k / 2 : w.format == WeightFormat::int4 ? (k + 1) / 2 : k;
  while ((int64_t(1) << w.row_shift) < block_rows) ++w.row_shift;
  while ((int64_t(1) << w.group_shift) < group) ++w.group_shift;
  const bool wide = group % 32 == 0 && (group & (group - 1)) == 0;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (w.format) {
    case WeightFormat::int8: launch<Int8>(a, w, wide, s); break;
    case WeightFormat::e4m3: launch<Fp8<false>>(a, w, wide, s); break;
    case WeightFormat::e5m2: launch<Fp8<true>>(a, w, wide, s); break;
    case WeightFormat::nf4:
    case WeightFormat::fp4: launch<Book4>(a, w, wide, s); break;
    case WeightFormat::int4:
      zero == nullptr ? launch_int4<false>(a, w, wide, s) : launch_int4<true>(a, w, wide, s);
      break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
