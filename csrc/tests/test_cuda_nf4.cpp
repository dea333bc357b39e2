// The CUDA nf4 kernel, emulated, against the scalar CPU kernel: the same bits.
#include "cuda_emulation.h"

#include <cstdio>
#include <cstring>

#include "cpu/quantize.h"
#include "cuda/nf4_dequantize.cuh"

namespace {

template <class Out>
bool same(int64_t n, int block_shift, bool nested, bool aligned, gp::DType dtype) {
  const int64_t block = int64_t(1) << block_shift, blocks = (n + block - 1) / block;
  std::vector<uint4> memory(size_t(n / 32 + 2));
  uint8_t* q = reinterpret_cast<uint8_t*>(memory.data());
  for (int64_t i = 0; i < (n + 1) / 2; ++i) q[i] = uint8_t(i * 37 + i / 7);
  std::vector<float> absmax(size_t(blocks) + 1), second(size_t(blocks / 256) + 1), map(256);
  std::vector<uint8_t> codes(size_t(blocks) + 1);
  for (int64_t i = 0; i < blocks; ++i) absmax[i] = 0.01f * float(i % 97) + 1e-3f;
  for (int64_t i = 0; i < blocks; ++i) codes[i] = uint8_t(i * 29);
  for (int i = 0; i < 256; ++i) map[i] = (float(i) - 127.5f) / 128.0f;
  for (float& s : second) s = 0.37f;
  const float offset = 0.71f;
  const Scales scales{nested ? static_cast<const void*>(codes.data()) : absmax.data(),
                      nested ? second.data() : nullptr, &offset, map.data()};
  std::vector<uint4> got(size_t(n * sizeof(Out) / 16 + 2)), want(got);
  std::memset(got.data(), 0xab, got.size() * 16);
  std::memset(want.data(), 0xab, want.size() * 16);
  // Fewer blocks than the tensor needs, so that the grid strides.
  emulate(2, 32 * kWarps, [&] {
    nf4_dequantize_kernel<Out>(q, scales, n, block_shift, reinterpret_cast<Out*>(got.data()),
                               aligned);
  });
  gp::scalar::dequantize_book(gp::Book::nf4, q, {scales.scale, scales.nested, scales.offset, scales.map}, n, block,
                             want.data(), dtype, 1);
  const bool equal = !std::memcmp(got.data(), want.data(), got.size() * 16);
  if (!equal)
    std::printf("nf4 differs: n %lld shift %d nested %d aligned %d dtype %d\n", (long long)n,
                block_shift, nested, aligned, int(dtype));
  return equal;
}

}  // namespace

int main() {
  bool ok = true;
  for (int64_t n : {1, 63, 1024, 8192, 40001})
    for (bool nested : {false, true})
      for (bool aligned : {false, true}) {
        ok &= same<float>(n, 6, nested, aligned, gp::DType::f32);
        ok &= same<__nv_bfloat16>(n, 5, nested, aligned, gp::DType::bf16);
        ok &= same<__half>(n, 12, nested, aligned, gp::DType::f16);
      }
  std::printf(ok ? "ok\n" : "FAILED\n");
  return ok ? 0 : 1;
}
