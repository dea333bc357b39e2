// Launching nf4_dequantize.cuh.
#include "cuda/nf4_dequantize.cuh"

#include "common/dtype.h"

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
  const bool aligned = (reinterpret_cast<uintptr_t>(q) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  nf4_dequantize_kernel<Out><<<unsigned(needed < resident ? needed : resident), 32 * kWarps, 0,
                               stream>>>(q, scales, n, block_shift, static_cast<Out*>(out), aligned);
  return cudaGetLastError();
}

}  // namespace

// All pointers are device memory, and trusted. block is a power of two of at least 32; nested, offset
// and map are null without double quantization. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int gp_cuda_nf4_dequantize(
    const uint8_t* q, const void* scale, const float* nested, const float* offset,
    const float* map, int64_t n, int64_t block, void* out, int dtype, int device, void* stream) {
  if (n == 0) return cudaSuccess;
  int shift = 0;
  while ((int64_t(1) << shift) < block) ++shift;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const Scales scales{scale, nested, offset, map};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (gp::DType(dtype)) {
    case gp::DType::f32: error = launch<float>(q, scales, n, shift, out, device, on); break;
    case gp::DType::bf16: error = launch<__nv_bfloat16>(q, scales, n, shift, out, device, on); break;
    case gp::DType::f16: error = launch<__half>(q, scales, n, shift, out, device, on); break;
    default: error = cudaErrorInvalidValue;
  }
  if (before != device) cudaSetDevice(before);
  return error;
}

extern "C" __attribute__((visibility("default"))) const char* gp_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
