// Quantize kernels without Python: a golden vector, every instruction set alike, any thread count.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/quantize.h"

namespace {

int failures = 0;
void check(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED on %s: %s\n", gp::isa_name(gp::active_isa()), what);
}

std::vector<float> weights(int64_t n) {
  std::vector<float> x(n);
  uint32_t state = 12345;
  for (float& v : x) {
    state = state * 1664525u + 1013904223u;
    v = (float(state >> 8) / 8388608.0f - 1.0f) * std::exp2(float(int(state >> 3 & 15) - 8));
  }
  return x;
}

void golden_nf4() {
  float x[64], absmax = 0.0f;
  for (int i = 0; i < 64; ++i) x[i] = 2.0f * float(i) / 63.0f - 1.0f;
  uint8_t q[32];
  const int status = GP_KERNEL(quantize_book)(gp::Book::nf4, x, gp::DType::f32, 64, 64, q, &absmax, 1);
  char hex[65];
  for (int i = 0; i < 32; ++i) std::snprintf(hex + 2 * i, 3, "%02x", unsigned(q[i]));
  check(status == 0 && absmax == 1.0f, "absmax of the golden vector");
  check(!std::strcmp(hex, "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"),
        "codes of the golden vector");
}

// Everything that the kernels make of one tensor, in one row of bytes.
std::vector<uint8_t> all_bytes(int threads) {
  const int64_t rows = 37, cols = 1000, n = rows * cols;
  const std::vector<float> x = weights(n);
  std::vector<uint8_t> bytes;
  const auto keep = [&](const void* p, size_t size) {
    const uint8_t* b = static_cast<const uint8_t*>(p);
    bytes.insert(bytes.end(), b, b + size);
  };
  std::vector<uint8_t> q(n), zero(rows * 8);
  std::vector<float> scale(rows * 64), out(n);
  for (gp::Code8 code : {gp::Code8::s8, gp::Code8::e4m3fn, gp::Code8::e5m2, gp::Code8::e4m3_240,
                         gp::Code8::e3m4}) {
    const gp::ScaledArgs a{1, rows, cols, 1, cols, code, threads};
    check(!GP_KERNEL(quantize_scaled)(a, x.data(), gp::DType::f32, q.data(), scale.data(), false),
          "quantize_scaled");
    GP_KERNEL(dequantize_scaled)(a, q.data(), scale.data(), out.data(), gp::DType::f32);
    keep(q.data(), q.size());
    keep(out.data(), out.size() * 4);
  }
  for (int bits : {4, 3, 2}) {
    const gp::GroupArgs g{bits, rows, cols, 128, gp::DType::f32, threads};
    check(!GP_KERNEL(quantize_groups)(g, x.data(), gp::DType::f32, q.data(), scale.data(),
                                      zero.data()), "quantize_groups");
    GP_KERNEL(dequantize_groups)(g, q.data(), scale.data(), zero.data(), out.data(),
                                 gp::DType::bf16);
    keep(q.data(), size_t(n) * bits / 8);
    keep(zero.data(), zero.size());
    keep(out.data(), size_t(n) * 2);
  }
  check(!GP_KERNEL(quantize_book)(gp::Book::nf4, x.data(), gp::DType::f32, n, 64, q.data(), scale.data(), threads),
        "quantize_book");
  GP_KERNEL(dequantize_book)(gp::Book::nf4, q.data(), {scale.data(), nullptr, nullptr, nullptr}, n, 64, out.data(),
                            gp::DType::f16, threads);
  keep(q.data(), n / 2);
  keep(out.data(), size_t(n) * 2);
  return bytes;
}

void refuses_nonfinite() {
  std::vector<float> x = weights(640), scale(64);
  std::vector<uint8_t> q(640);
  for (float bad : {float(INFINITY), float(-INFINITY), float(NAN)}) {
    x[333] = bad;
    const int nonfinite = int(gp::QuantizeStatus::nonfinite);
    check(GP_KERNEL(quantize_book)(gp::Book::nf4, x.data(), gp::DType::f32, 640, 64, q.data(), scale.data(), 2) ==
              nonfinite, "nf4 refuses");
    check(GP_KERNEL(quantize_groups)({4, 5, 128, 32, gp::DType::f32, 2}, x.data(), gp::DType::f32,
                                     q.data(), scale.data(), nullptr) == nonfinite, "int4 refuses");
    check(GP_KERNEL(quantize_scaled)({1, 5, 128, 1, 128, gp::Code8::s8, 2}, x.data(),
                                     gp::DType::f32, q.data(), scale.data(), false) == nonfinite,
          "int8 refuses");
  }
}

}  // namespace

int main() {
  std::vector<uint8_t> first;
  for (gp::Isa isa : {gp::Isa::scalar, gp::Isa::avx2, gp::Isa::avx512}) {
    if (!gp::force_isa(isa)) continue;
    golden_nf4();
    refuses_nonfinite();
    for (int threads : {1, 3}) {
      const std::vector<uint8_t> bytes = all_bytes(threads);
      if (first.empty()) first = bytes;
      check(bytes == first, "the bytes of the scalar kernels on one thread");
    }
  }
  if (!failures) std::printf("ok\n");
  return failures != 0;
}
