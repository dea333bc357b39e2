// CUDA quantization and dequantization, emulated, against the scalar CPU kernels: the same bits.
#include "cuda_emulation.h"

#include <cstdio>
#include <cstring>

#include "cpu/quantize.h"
#include "cuda/dequantize.cu"
#include "cuda/quantize.cu"

namespace {

constexpr gp::DType kTypes[] = {gp::DType::f32, gp::DType::bf16, gp::DType::f16};

// Memory aligned to 16 bytes, of which what begins `shift` bytes later is used.
struct Memory {
  Memory(int64_t bytes, int shift) : words(size_t(bytes) / 16 + 3), shift(shift) {
    std::memset(words.data(), 0xab, words.size() * 16);
  }
  uint8_t* data() { return reinterpret_cast<uint8_t*>(words.data()) + shift; }
  bool operator==(const Memory& other) const {
    return !std::memcmp(words.data(), other.words.data(), words.size() * 16);
  }
  std::vector<uint4> words;
  int shift;
};

struct Shape {
  int64_t n, k;
};
// One weight; whole tiles and a cut one; rows that no 16-byte store fits; more than the grid takes
// at once.
constexpr Shape kShapes[] = {{1, 1}, {3, 344}, {7, 123}, {40, 4096}};

gp::Code8 code_of(WeightFormat format, float limit) {
  if (format == WeightFormat::int8) return gp::Code8::s8;
  if (format == WeightFormat::e5m2) return gp::Code8::e5m2;
  return limit == 240.0f ? gp::Code8::e4m3_240 : gp::Code8::e4m3fn;
}

bool dequantized(WeightFormat format, Shape s, int64_t group, int64_t block_rows, bool extra,
                 int shift, gp::DType dtype) {
  const bool book = format == WeightFormat::nf4 || format == WeightFormat::fp4;
  const bool int4 = format == WeightFormat::int4;
  const int64_t count = s.n * s.k, row_bytes = int4 ? (s.k + 1) / 2 : s.k;
  const int64_t bytes = book ? (count + 1) / 2 : s.n * row_bytes;
  const int64_t stride = book ? 1 : (s.k + group - 1) / group;
  const int64_t scales = book ? (count + group - 1) / group
                              : (s.n + block_rows - 1) / block_rows * stride;
  Memory q(bytes, shift), got(4 * count, shift), want(4 * count, shift);
  for (int64_t i = 0; i < bytes; ++i) q.data()[i] = uint8_t(i * 37 + i / 7);
  if (format == WeightFormat::e4m3 || format == WeightFormat::e5m2)
    for (int64_t i = 0; i < bytes; ++i) q.data()[i] &= 0xfb;  // no NaN: its bits may differ
  std::vector<float> scale(size_t(scales) + 1), nested(size_t(scales / 256) + 1, 0.37f), map(256);
  std::vector<uint8_t> codes(size_t(scales) + 1);
  for (int64_t i = 0; i < scales; ++i) scale[i] = 0.01f * float(i % 97) + 1e-3f;
  for (int64_t i = 0; i < scales; ++i) codes[i] = uint8_t(i * 29 % (book ? 256 : 16));
  for (int i = 0; i < 256; ++i) map[i] = (float(i) - 127.5f) / 128.0f;
  const float offset = 0.71f;
  const bool twice = extra && book;
  const void* scale_at = twice ? static_cast<const void*>(codes.data()) : scale.data();
  const float* nested_at = twice ? nested.data() : nullptr;
  const uint8_t* zero = extra && int4 ? codes.data() : nullptr;
  const int error = gp_cuda_dequantize(int(format), s.n, s.k, q.data(), scale_at, 0, zero,
                                       nested_at, &offset, map.data(), group, block_rows, stride,
                                       got.data(), int(dtype), 0, nullptr);
  if (book) {
    gp::scalar::dequantize_book(format == WeightFormat::nf4 ? gp::Book::nf4 : gp::Book::fp4,
                                q.data(), {scale_at, nested_at, &offset, map.data()}, count, group,
                                want.data(), dtype, 1);
  } else if (int4) {
    gp::scalar::dequantize_groups({4, s.n, s.k, group, gp::DType::f32, 1}, q.data(), scale_at,
                                  zero, want.data(), dtype);
  } else {
    gp::scalar::dequantize_scaled({1, s.n, s.k, block_rows, group, code_of(format, 448.0f), 1},
                                  q.data(), scale.data(), want.data(), dtype);
  }
  const bool equal = error == 0 && got == want;
  if (!equal)
    std::printf("format %d differs: %lld x %lld group %lld rows %lld extra %d shift %d dtype %d\n",
                int(format), (long long)s.n, (long long)s.k, (long long)group,
                (long long)block_rows, extra, shift, int(dtype));
  return equal;
}

bool quantized(WeightFormat format, Shape s, int64_t width, float limit, int shift,
               gp::DType dtype) {
  const bool book = format == WeightFormat::nf4 || format == WeightFormat::fp4;
  const int64_t count = s.n * s.k, scales = book ? (count + width - 1) / width
                                                 : s.n * ((s.k + width - 1) / width);
  Memory x(4 * count, shift), got(count, shift), want(count, shift);
  Memory scale(4 * scales, shift), want_scale(4 * scales, shift);
  for (int64_t i = 0; i < count; ++i) {
    const int exponent = int(i / s.k % 9) - 12;
    store(i % 131 < 64 ? 0.0f : std::ldexp(float(i * 7919 % 2003 - 1001), exponent), x.data(),
          dtype, i);
  }
  const int64_t rows = book ? 1 : s.n, k = book ? count : s.k;
  const int error = gp_cuda_quantize(int(format), x.data(), int(dtype), rows, k, width, limit,
                                     nullptr, got.data(), reinterpret_cast<float*>(scale.data()),
                                     0, nullptr);
  float* scale_at = reinterpret_cast<float*>(want_scale.data());
  if (book) {
    gp::scalar::quantize_book(format == WeightFormat::nf4 ? gp::Book::nf4 : gp::Book::fp4, x.data(),
                              dtype, count, width, want.data(), scale_at, 1);
  } else {
    gp::scalar::quantize_scaled({1, s.n, s.k, 1, width, code_of(format, limit), 1}, x.data(), dtype,
                                want.data(), scale_at, false);
  }
  const bool equal = error == 0 && got == want && scale == want_scale;
  if (!equal)
    std::printf("codes %d differ: %lld x %lld width %lld limit %g shift %d dtype %d\n", int(format),
                (long long)s.n, (long long)s.k, (long long)width, double(limit), shift, int(dtype));
  return equal;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Shape s : kShapes)
    for (const gp::DType dtype : kTypes)
      for (const int shift : {0, 4}) {
        if (s.k == 4096 && (shift != 0 || dtype != gp::DType::bf16)) continue;  // enough once
        const auto same = [&](WeightFormat format, int64_t group, int64_t rows, bool extra) {
          ok &= dequantized(format, s, group, rows, extra, shift, dtype);
        };
        for (const bool extra : {false, true}) {
          same(WeightFormat::nf4, 64, 1, extra);
          same(WeightFormat::fp4, 4096, 1, extra);
          same(WeightFormat::int4, 24, 1, extra);
          same(WeightFormat::int4, s.k, 1, extra);
        }
        same(WeightFormat::int8, s.k, 1, false);
        for (const WeightFormat fp8 : {WeightFormat::e4m3, WeightFormat::e5m2}) {
          same(fp8, s.k, 1, false);
          same(fp8, 128, 1, false);
          same(fp8, 128, 128, false);
        }
        const auto encoded = [&](WeightFormat format, int64_t width, float limit) {
          ok &= quantized(format, s, width, limit, shift, dtype);
        };
        for (const int64_t block : {32, 64, 4096}) {
          encoded(WeightFormat::nf4, block, 0.0f);
          encoded(WeightFormat::fp4, block, 0.0f);
        }
        encoded(WeightFormat::int8, s.k, 0.0f);
        for (const int64_t width : {s.k, int64_t(128)}) {
          encoded(WeightFormat::e4m3, width, 448.0f);
          encoded(WeightFormat::e4m3, width, 240.0f);
          encoded(WeightFormat::e5m2, width, 57344.0f);
        }
      }
  std::printf(ok ? "ok\n" : "FAILED\n");
  return ok ? 0 : 1;
}
