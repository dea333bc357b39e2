// Launching quantize.cuh.
#include "cuda/quantize.cuh"

#include "cuda/launch.h"

namespace {

// Codes of all places, 4 bits each.
constexpr uint64_t order_of(const unsigned char (&codes)[16]) {
  uint64_t order = 0;
  for (int i = 0; i < 16; ++i) order |= uint64_t(codes[i]) << 4 * i;
  return order;
}

struct Call {
  const void* x;
  gp::DType dtype;
  Segments segments;
  float limit;
  bool fp4;
  const float* given;
  uint8_t* q;
  float* scale;
  cudaStream_t stream;
};

template <class Code, class In>
cudaError_t launch(const Call& call) {
  constexpr int kRun = 16 / sizeof(In), kStored = kRun * Code::kBits / 8;
  Segments s = call.segments;
  s.whole = (s.count == s.per_row || s.k % kRun == 0) &&
            reinterpret_cast<uintptr_t>(call.x) % 16 == 0 &&
            reinterpret_cast<uintptr_t>(call.q) % kStored == 0;
  s.team = 1;
  while (s.team < 32 && s.team * kRun < s.width) s.team *= 2;
  if (s.width > 4 * 32 * kRun) s.team = kQuantizeThreads;
  const int64_t teams = kQuantizeThreads / s.team, blocks = (s.count + teams - 1) / teams;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const uint64_t order = order_of(gp::NF4_ORDER), fp4_order = order_of(gp::FP4_ORDER);
  GP_LAUNCH((quantize_kernel<Code, In>), unsigned(blocks), kQuantizeThreads, call.stream,
            static_cast<const In*>(call.x), s, call.limit, call.fp4,
            call.fp4 ? fp4_order : order, call.given, call.q, call.scale);
  return cudaGetLastError();
}

template <class Code>
cudaError_t launch(const Call& call) {
  switch (call.dtype) {
    case gp::DType::f32: return launch<Code, float>(call);
    case gp::DType::bf16: return launch<Code, __nv_bfloat16>(call);
    case gp::DType::f16: return launch<Code, __half>(call);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// x (n, k) in dtype, contiguous, to codes q and one scale for every `width` elements of a row; nf4
// and fp4 take x as one row. All pointers are device memory, and trusted.
//   width: nf4 and fp4: a power of two from 32 to 4096; otherwise, where it is less than k, a
//   multiple of 8.
//   limit: the largest magnitude of an fp8 format.
//   q null: scale takes the largest finite magnitudes instead. given: that of the whole of x, which
//   then has one scale.
// Returns a cudaError_t.
GP_EXPORT int gp_cuda_quantize(int format, const void* x, int dtype, int64_t n, int64_t k,
                               int64_t width, float limit, const float* given, uint8_t* q,
                               float* scale, int device, void* stream) {
  if (n == 0 || k == 0) return cudaSuccess;
  if (n < 0 || k < 0 || width < 1) return cudaErrorInvalidValue;
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  const int64_t per_row = (k + width - 1) / width;
  const Call call{x, gp::DType(dtype), {n * per_row, k, width, per_row, 1, false}, limit,
                  format == int(WeightFormat::fp4), given, q, scale,
                  static_cast<cudaStream_t>(stream)};
  switch (WeightFormat(format)) {
    case WeightFormat::int8: return launch<Int8Code>(call);
    case WeightFormat::e4m3: return launch<Fp8Code<3, -6>>(call);
    case WeightFormat::e5m2: return launch<Fp8Code<2, -14>>(call);
    case WeightFormat::nf4:
    case WeightFormat::fp4: return launch<BookCode>(call);
    default: return cudaErrorInvalidValue;
  }
}
