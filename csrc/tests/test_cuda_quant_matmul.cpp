// The CUDA product with quantized weights, emulated, against sums in double of weights that this
// file decodes its own way. tests/ops/test_quant_matmul_cuda.py compares more cases with the
// reference.
#include "cuda_emulation.h"

#include "compare.h"
#include "cuda/library.cu"
#include "cuda/quant_matmul.cu"

namespace {

constexpr float kCanary = 12288.0f;

double fp8(int code, int mantissa_bits, int bias) {
  const int exponent = (code & 127) >> mantissa_bits, fraction = code & ((1 << mantissa_bits) - 1);
  const double size = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa_bits)
                                    : std::ldexp((1 << mantissa_bits) + fraction,
                                                 exponent - bias - mantissa_bits);
  return code & 128 ? -size : size;
}

struct Case {
  WeightFormat format;
  int64_t n, k, group;
  bool zeros = false, nested = false;
  gp::DType dtype = gp::DType::f32;
};

// Numbers of a type that is known at run time, at an address that the kernels take.
class Numbers {
 public:
  Numbers(size_t count, gp::DType dtype) : memory_(count / 4 + 1), dtype_(dtype) {}
  void* data() { return memory_.data(); }
  void set(size_t i, float value) { store(value, data(), dtype_, int64_t(i)); }
  float operator[](size_t i) const { return load(memory_.data(), dtype_, int64_t(i)); }

 private:
  std::vector<uint4> memory_;
  gp::DType dtype_;
};

struct Stored {
  std::vector<uint4> q;  // aligned
  std::vector<float> scale, nested, map;
  std::vector<uint8_t> codes, zero;
  float offset = 0.5f;
  int64_t rows = 1, stride = 1;
};

bool is_book(const Case& c) {
  return c.format == WeightFormat::nf4 || c.format == WeightFormat::fp4;
}

Stored fill(const Case& c) {
  Stored s;
  uint32_t state = 7;
  const auto byte = [&] { return uint8_t((state = state * 1664525u + 1013904223u) >> 24); };
  s.q.resize(size_t(c.n * (c.k + 1) / 16 + 2));
  uint8_t* q = reinterpret_cast<uint8_t*>(s.q.data());
  for (size_t i = 0; i < s.q.size() * 16; ++i) {
    q[i] = byte();
    // Codes that are no numbers would hide what stands beside them; the Python tests have them.
    if (c.format == WeightFormat::e4m3 && (q[i] & 127) == 127) q[i] = 1;
    if (c.format == WeightFormat::e5m2 && (q[i] & 127) >= 124) q[i] = 1;
  }
  if (!is_book(c)) s.stride = (c.k + c.group - 1) / c.group;
  const int64_t count = is_book(c) ? (c.n * c.k + c.group - 1) / c.group : c.n * s.stride;
  for (int64_t i = 0; i < count; ++i) {
    s.scale.push_back(0.01f * float(1 + byte()));
    s.codes.push_back(byte());
    s.zero.push_back(byte() % 16);
  }
  for (int64_t i = 0; i <= count / 256; ++i) s.nested.push_back(0.25f + float(byte()) / 256.0f);
  for (int i = 0; i < 256; ++i) s.map.push_back((float(i) - 127.5f) / 256.0f);
  return s;
}

double weight(const Case& c, const Stored& s, int64_t row, int64_t column) {
  const uint8_t* q = reinterpret_cast<const uint8_t*>(s.q.data());
  if (is_book(c)) {
    const int64_t at = row * c.k + column, block = at / c.group;
    const int code = at % 2 ? q[at / 2] % 16 : q[at / 2] / 16;
    const double scale = c.nested ? s.map[s.codes[block]] * s.nested[block / 256] + s.offset
                                  : s.scale[block];
    return (c.format == WeightFormat::nf4 ? gp::NF4 : gp::FP4)[code] * scale;
  }
  const int64_t at = row * s.stride + column / c.group;
  const uint8_t code = q[row * c.k + column];
  switch (c.format) {
    case WeightFormat::int8: return int8_t(code) * double(s.scale[at]);
    case WeightFormat::e4m3: return fp8(code, 3, 7) * s.scale[at];
    case WeightFormat::e5m2: return fp8(code, 2, 15) * s.scale[at];
    default: break;
  }
  const uint8_t both = q[row * ((c.k + 1) / 2) + column / 2];
  const int nibble = column % 2 ? both / 16 : both % 16;
  return (nibble - (c.zeros ? int(s.zero[at]) : 8)) * double(s.scale[at]);
}

// y (m, n) between canaries; a row that was not there before must not change the others.
std::vector<float> product(const Case& c, const Stored& s, Numbers& x, int m,
                           const std::vector<float>& bias) {
  const size_t count = size_t(m * c.n);
  Numbers y(count + 16, c.dtype);
  for (size_t i = 0; i < count + 16; ++i) y.set(i, kCanary);
  const size_t size = c.dtype == gp::DType::f32 ? 4 : 2;
  const bool nested = c.nested;
  const int error = gp_cuda_quant_matmul(
      int(c.format), c.n, c.k, reinterpret_cast<const uint8_t*>(s.q.data()),
      nested ? static_cast<const void*>(s.codes.data()) : s.scale.data(), 0,
      c.zeros ? s.zero.data() : nullptr, nested ? s.nested.data() : nullptr, &s.offset,
      s.map.data(), c.group, s.rows, s.stride, x.data(), m, int(c.dtype), bias.data(), 0,
      static_cast<char*>(y.data()) + 8 * size, 0, nullptr);
  bool kept = error == 0;
  for (size_t i = 0; i < 8; ++i) kept &= y[i] == kCanary && y[count + 15 - i] == kCanary;
  if (!kept) {
    ++failures;
    std::printf("FAILED error %d, or memory beside the result was written\n", error);
  }
  std::vector<float> out;
  for (size_t i = 0; i < count; ++i) out.push_back(y[8 + i]);
  return out;
}

void check(const Case& c) {
  const Stored s = fill(c);
  uint32_t state = 3;
  Numbers x(size_t(8 * c.k), c.dtype);
  for (int64_t i = 0; i < 8 * c.k; ++i) x.set(size_t(i), noise(state));
  std::vector<float> bias(size_t(c.n));
  for (float& b : bias) b = noise(state);
  std::vector<double> want;
  double scale = 0;
  for (int64_t m = 0; m < 8; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = bias[n], size = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const double term = x[size_t(m * c.k + k)] * weight(c, s, n, k);
        sum += term, size += std::fabs(term);
      }
      want.push_back(sum);
      scale = std::fmax(scale, size);
    }
  const std::vector<float> all = product(c, s, x, 8, bias);
  const double step = c.dtype == gp::DType::bf16 ? 0x1p-8 : c.dtype == gp::DType::f16 ? 0x1p-11 : 0;
  double largest = 0;
  for (double y : want) largest = std::fmax(largest, std::fabs(y));
  compare("cuda quant_matmul", all, want, 4e-6 * scale + step * largest + 1e-6);
  for (int m : {1, 2, 3, 5}) {
    const std::vector<float> some = product(c, s, x, m, bias);
    if (!std::equal(some.begin(), some.end(), all.begin())) {
      ++failures;
      std::printf("FAILED %d rows differ from the first of 8: format %d, k %lld\n", m,
                  int(c.format), (long long)c.k);
    }
  }
}

void expect(const char* what, int got, int want) {
  if (got == want) return;
  ++failures;
  std::printf("FAILED %s: error %d, expected %d\n", what, got, want);
}

void check_refusals() {
  const Case c{WeightFormat::int8, 4, 32, 32};
  const Stored s = fill(c);
  std::vector<float4> x(16), y(8);
  const auto call = [&](int format, int offset, int m, int device) {
    const uint8_t* q = reinterpret_cast<const uint8_t*>(s.q.data()) + offset;
    return gp_cuda_quant_matmul(format, 4, 32, q, s.scale.data(), 0, nullptr, nullptr, nullptr,
                                nullptr, 32, 1, 1, x.data(), m, 0, nullptr, 0, y.data(), device,
                                nullptr);
  };
  expect("a good call", call(0, 0, 1, 0), cudaSuccess);
  expect("9 rows", call(0, 0, 9, 0), cudaErrorInvalidValue);
  expect("no such format", call(6, 0, 1, 0), cudaErrorInvalidValue);
  expect("q at a multiple of 8", call(0, 8, 1, 0), cudaErrorMisalignedAddress);
  expect("no such device", call(0, 0, 1, 1), cudaErrorInvalidDevice);
}

}  // namespace

int main() {
  // One chunk, cut tiles and slabs, rows past the last, groups that no wide kernel takes, odd
  // columns.
  for (int64_t k : {32, 160, 1056, 4128}) {
    check({WeightFormat::nf4, 5, k, 64});
    check({WeightFormat::int4, 19, k, 32, true});
    check({WeightFormat::e4m3, 3, k, 128});
  }
  check({WeightFormat::fp4, 7, 96, 32, false, true});
  check({WeightFormat::nf4, 33, 1024, 128, false, true});
  check({WeightFormat::nf4, 5, 33, 64, false, true});
  check({WeightFormat::int4, 6, 1024, 1024});
  check({WeightFormat::int4, 6, 72, 24, true});
  check({WeightFormat::int4, 5, 33, 8});
  check({WeightFormat::int8, 6, 528, 528});
  check({WeightFormat::int8, 6, 17, 17});
  check({WeightFormat::e5m2, 6, 272, 128});
  check({WeightFormat::e5m2, 6, 5, 128});
  // By tensor cores: one step, all warps and one more, three steps of a warp.
  for (gp::DType dtype : {gp::DType::bf16, gp::DType::f16}) {
    check({WeightFormat::int4, 5, 128, 128, false, false, dtype});
    check({WeightFormat::int4, 19, 9 * 128, 9 * 128, true, false, dtype});
    check({WeightFormat::int4, 16, 17 * 128, 128, true, false, dtype});
    check({WeightFormat::int4, 3, 160, 32, true, false, dtype});
    check({WeightFormat::nf4, 3, 160, 64, false, false, dtype});
  }
  check_refusals();
  std::printf(failures ? "FAILED\n" : "ok\n");
  return failures ? 1 : 0;
}
