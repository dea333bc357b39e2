// Launching dequantize.cuh.
#include "cuda/dequantize.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace {

template <class Format, class Out>
cudaError_t launch(const Weight& w, Out* out, int device, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto blocks = [&](int64_t work, int64_t of_block) {
    const int64_t needed = (work + of_block - 1) / of_block;
    return unsigned(std::min(needed, int64_t(processors) * 8));  // 2048 threads on each
  };
  constexpr int64_t kTile = 32 * Format::kColumns;
  const int64_t count = w.n * w.k, tiles = whole_runs(w, out) ? count / kTile : 0;
  const int64_t rest = count - tiles * kTile;
  if (tiles != 0)
    GP_LAUNCH((dequantize_kernel<Format, Out>), blocks(tiles, kWarps), 32 * kWarps, stream, w,
              tiles, out);
  if (rest != 0)
    GP_LAUNCH(dequantize_any_kernel<Out>, blocks(rest, 32 * kWarps), 32 * kWarps, stream, w,
              count - rest, out);
  return cudaGetLastError();
}

template <class Format>
cudaError_t launch(const Weight& w, void* out, gp::DType dtype, int device, cudaStream_t s) {
  switch (dtype) {
    case gp::DType::f32: return launch<Format>(w, static_cast<float*>(out), device, s);
    case gp::DType::bf16: return launch<Format>(w, static_cast<__nv_bfloat16*>(out), device, s);
    case gp::DType::f16: return launch<Format>(w, static_cast<__half*>(out), device, s);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// out (n, k) in dtype, contiguous. All pointers are device memory, and trusted.
//   scale: of scale_dtype, or uint8 codes where nested, offset and map are not null.
//   group: columns that share a scale; with a code book, elements of the whole tensor, a power of
//   two of at least 32.
//   block_rows: rows that share one, a power of two or all n. stride: scales of a row.
// Returns a cudaError_t.
GP_EXPORT int gp_cuda_dequantize(int format, int64_t n, int64_t k, const uint8_t* q,
                                 const void* scale, int scale_dtype, const uint8_t* zero,
                                 const float* nested, const float* offset, const float* map,
                                 int64_t group, int64_t block_rows, int64_t stride, void* out,
                                 int dtype, int device, void* stream) {
  if (n == 0 || k == 0) return cudaSuccess;
  if (n < 0 || k < 0 || group < 1 || block_rows < 1) return cudaErrorInvalidValue;
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  Weight w{WeightFormat(format), q, {scale, nested, offset, map}, gp::DType(scale_dtype),
           zero, n, k, k, stride, group, 0, 0};
  const bool book = w.format == WeightFormat::nf4 || w.format == WeightFormat::fp4;
  if (!book && group > k) w.group = k;
  if (w.format == WeightFormat::int4) w.row_bytes = (k + 1) / 2;
  while ((int64_t(1) << w.row_shift) < block_rows) ++w.row_shift;
  while ((int64_t(1) << w.group_shift) < w.group) ++w.group_shift;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const gp::DType to = gp::DType(dtype);
  switch (w.format) {
    case WeightFormat::int8: return launch<Int8>(w, out, to, device, s);
    case WeightFormat::e4m3: return launch<Fp8<false>>(w, out, to, device, s);
    case WeightFormat::e5m2: return launch<Fp8<true>>(w, out, to, device, s);
    case WeightFormat::nf4:
    case WeightFormat::fp4: return launch<Book4>(w, out, to, device, s);
    case WeightFormat::int4:
      return zero == nullptr ? launch<Int4<false>>(w, out, to, device, s)
                             : launch<Int4<true>>(w, out, to, device, s);
  }
  return cudaErrorInvalidValue;
}
