// Launching nf4_dequantize.cuh.
#include "cuda/nf4_dequantize.cuh"

#include "cuda/launch.h"

namespace {

template <class Out>
cudaError_t launch(const uint8_t* q, const Scales& scales, int64_t n, int block_shift, void* out,
                   int device, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t needed = (n + kWarps * kWarpElements - 1) / (kWarps * kWarpElements);
  const int64_t resident = int64_t(processors) * 8;  // 2048 threads on each
  const uintptr_t places = reinterpret_cast<uintptr_t>(q) | reinterpret_cast<uintptr_t>(out);
  const bool aligned = places % 16 == 0;
  GP_LAUNCH(nf4_dequantize_kernel<Out>, unsigned(needed < resident ? needed : resident),
            32 * kWarps, stream, q, scales, n, block_shift, static_cast<Out*>(out), aligned);
  return cudaGetLastError();
}

}  // namespace

// All pointers are device memory, and trusted. block is a power of two of at least 32; nested,
// offset and map are null without double quantization. Returns a cudaError_t.
GP_EXPORT int gp_cuda_nf4_dequantize(const uint8_t* q, const void* scale, const float* nested,
                                     const float* offset, const float* map, int64_t n,
                                     int64_t block, void* out, int dtype, int device,
                                     void* stream) {
  if (n == 0) return cudaSuccess;
  int shift = 0;
  while ((int64_t(1) << shift) < block) ++shift;
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  const Scales scales{scale, nested, offset, map};
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (gp::DType(dtype)) {
    case gp::DType::f32: return launch<float>(q, scales, n, shift, out, device, s);
    case gp::DType::bf16: return launch<__nv_bfloat16>(q, scales, n, shift, out, device, s);
    case gp::DType::f16: return launch<__half>(q, scales, n, shift, out, device, s);
    default: return cudaErrorInvalidValue;
  }
}
