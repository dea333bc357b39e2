// quant_matmul in every instruction set, format and layout against a double product, with an
// unmapped page right before and right after each buffer.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/codebooks.h"
#include "cpu/quant_matmul.h"

using namespace gp;

namespace {

int failures = 0;
uint32_t state = 1;

uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
float random_float() { return float(random_bits() & 0xffff) / 32768.0f - 1.0f; }

// `bytes` bytes that end at an unmapped page, or begin after one.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes / page + 1) * page;
    length_ = inner + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner, page, PROT_NONE);
    data_ = base_ + page + (at_end ? inner - bytes : 0);
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  template <class T>
  T* as() { return reinterpret_cast<T*>(data_); }

 private:
  char *base_, *data_;
  size_t length_;
};

struct Layout {
  const char* name;
  QuantFormat format;
  int64_t group;
  bool extra;  // zero points, or double quantization
};
const Layout LAYOUTS[] = {
    {"int8", QuantFormat::int8, -1, false},       {"fp8 row", QuantFormat::fp8, -1, false},
    {"fp8 tensor", QuantFormat::fp8, 0, false},   {"fp8 block", QuantFormat::fp8, 128, false},
    {"e5m2", QuantFormat::fp8_e5m2, -1, false},   {"nf4", QuantFormat::nf4, 64, false},
    {"nf4 double", QuantFormat::nf4, 64, true},   {"nf4 g32", QuantFormat::nf4, 32, false},
    {"nf4 g256", QuantFormat::nf4, 256, true},    {"int4", QuantFormat::int4, 128, false},
    {"int4 zeros", QuantFormat::int4, 128, true}, {"int4 g32", QuantFormat::int4, 32, true},
    {"int4 g24", QuantFormat::int4, 24, true},    {"int4 row", QuantFormat::int4, -1, false},
    {"int4 g64", QuantFormat::int4, 64, false},
    {"int3", QuantFormat::int3, 128, false},      {"int3 zeros", QuantFormat::int3, 128, true},
    {"int3 g24", QuantFormat::int3, 24, true},    {"int3 row", QuantFormat::int3, -1, false},
    {"int2", QuantFormat::int2, 128, true},       {"int2 g8", QuantFormat::int2, 8, false},
    {"e3m4", QuantFormat::fp8_e3m4, -1, false},   {"fp8 group", QuantFormat::fp8, -128, false},
};

// What int8 activations make of n elements that share a scale.
std::vector<double> as_int8(const float* x, int64_t n) {
  float absmax = 0;
  for (int64_t i = 0; i < n; ++i) absmax = std::fmax(absmax, std::fabs(x[i]));
  const float factor = 127.0f * (1.0f / absmax);
  std::vector<double> out;
  for (int64_t i = 0; i < n; ++i)
    out.push_back(absmax == 0 ? 0.0 : double(std::nearbyintf(x[i] * factor)) * absmax / 127.0);
  return out;
}

double fp8_value(uint8_t b, QuantFormat format) {
  const bool e5m2 = format == QuantFormat::fp8_e5m2, e3m4 = format == QuantFormat::fp8_e3m4;
  const int mantissa_bits = e5m2 ? 2 : e3m4 ? 4 : 3, bias = e5m2 ? 15 : e3m4 ? 3 : 7;
  const int exponent = (b & 0x7f) >> mantissa_bits, mantissa = b & ((1 << mantissa_bits) - 1);
  const double m = double(mantissa) / (1 << mantissa_bits);
  const double value = exponent ? std::ldexp(1.0 + m, exponent - bias) : std::ldexp(m, 1 - bias);
  return b & 0x80 ? -value : value;
}

// Writes a number as bf16 or fp16, both cut off, and returns what was written.
float store_half(float v, DType dtype, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const bool bf16 = dtype == DType::bf16;
  bits &= bf16 ? 0xffff0000u : std::fabs(v) < 0x1p-14f ? 0u : 0xffffe000u;
  std::memcpy(&v, &bits, 4);
  const uint32_t half = (bits & 0x7fffffffu) >> 13;
  *out = uint16_t(bf16 ? bits >> 16 : half == 0 ? 0 : bits >> 16 & 0x8000u | (half - (112u << 10)));
  return v;
}
float load_half(uint16_t h, DType dtype) {
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits = uint32_t(h) << 16;
  float v;
  if (dtype == DType::bf16) {
    std::memcpy(&v, &bits, 4);
    return v;
  }
  v = magnitude < 0x400u ? std::ldexp(float(magnitude), -24)
                         : std::ldexp(float((magnitude & 0x3ffu) | 0x400u), int(magnitude >> 10) - 25);
  return h & 0x8000u ? -v : v;
}

struct Case {
  Layout layout;
  int64_t m, n, k;
  bool at_end;
  DType dtype;
};

// Rows of 16-bit x, with and without outliers, one at a time: a bias takes the product away again, so
// that the rounding of y does not hide the kernel's.
void run_half(const Case& c, QuantMatmulArgs a, const std::vector<double>& w, const char* isa) {
  const int64_t n = c.n, k = c.k, m = c.m;
  Guarded x(m * k * 2, c.at_end), y(n * 2, c.at_end), bias(n * 4, c.at_end), all(m * n * 2, c.at_end);
  double worst = 0;
  bool ok = true, same = true;
  std::vector<double> wide(size_t(m * k));
  for (int64_t i = 0; i < m * k; ++i) {
    const float v = random_float() * (i / k % 2 && i % 50 == 7 ? 1000.0f : 1.0f);
    wide[size_t(i)] = store_half(v, c.dtype, x.as<uint16_t>() + i);
  }
  a.dtype = c.dtype;
  a.x = x.as<uint16_t>();
  a.y = all.as<uint16_t>();
  for (int64_t i = 0; i < n; ++i) bias.as<float>()[i] = 0.25f;
  a.bias = bias.as<float>();
  ok = GP_KERNEL(quant_matmul_forward)(a);
  a.m = 1;
  a.y = y.as<uint16_t>();
  for (int64_t i = 0; i < m; ++i) {
    a.x = x.as<uint16_t>() + i * k;
    for (int64_t r = 0; r < n; ++r) bias.as<float>()[r] = 0.25f;
    ok = ok && GP_KERNEL(quant_matmul_forward)(a);
    same = same && std::memcmp(y.as<char>(), all.as<char>() + i * n * 2, size_t(n) * 2) == 0;
    std::vector<double> size(size_t(n), 1e-30);
    for (int64_t r = 0; r < n; ++r) {
      double sum = 0;
      for (int64_t e = 0; e < k; ++e) {
        const double term = wide[size_t(i * k + e)] * w[size_t(r * k + e)];
        sum += term;
        size[size_t(r)] += std::fabs(term);
      }
      bias.as<float>()[r] = -float(sum);
    }
    ok = ok && GP_KERNEL(quant_matmul_forward)(a);
    for (int64_t r = 0; r < n; ++r)
      worst = std::fmax(
          worst, std::fabs(load_half(y.as<uint16_t>()[r], c.dtype)) / size[size_t(r)]);
  }
  // nf4 is within 2^-15.9 of the largest code, the smallest is 0.08 of it; x within 2^-12 of itself.
  if (!ok || !same || !(worst < 4e-4)) {
    std::printf("FAILED: %s %s %s m %ld n %ld k %ld: error %.2e, the same among others: %d\n", isa,
                c.layout.name, c.dtype == DType::bf16 ? "bf16" : "fp16", long(m), long(n), long(k),
                worst, int(same));
    ++failures;
  }
}

void run(const Case& c, const char* isa) {
  const int64_t n = c.n, k = c.k, m = c.m, g = c.layout.group;
  const QuantFormat format = c.layout.format;
  const bool nf4 = format == QuantFormat::nf4, e3m4 = format == QuantFormat::fp8_e3m4;
  const int bits = format == QuantFormat::int4 ? 4 : format == QuantFormat::int3 ? 3
      : format == QuantFormat::int2 ? 2 : 0;  // of integers in groups
  const int64_t row_bytes = (k * bits + 7) / 8, width = g == -128 ? 128 : g;
  const int64_t codes = nf4 ? (n * k + 1) / 2 : bits ? n * row_bytes : n * k;
  const int64_t row_groups = width > 0 ? (k + width - 1) / width : 1;
  const int64_t scales = nf4 ? (n * k + g - 1) / g
      : bits || g < 0 ? n * row_groups : g == 0 ? 1 : (n + 127) / 128 * row_groups;
  const int64_t nested = (scales + 255) / 256;
  Guarded qdata(codes, c.at_end), scale(scales * 4, c.at_end), extra(scales, c.at_end);
  Guarded nested_scale(nested * 4, c.at_end), map(256 * 4, c.at_end), shift(4, c.at_end);
  Guarded x(m * k * 4, c.at_end), y(m * n * 4, c.at_end), bias(n * 4, c.at_end);
  Guarded dy(m * n * 4, c.at_end), dx(m * k * 4, c.at_end);
  for (int64_t i = 0; i < codes; ++i) {
    uint8_t b = uint8_t(random_bits());
    // No NaN or infinity: their handling is tested from Python.
    if (format == QuantFormat::fp8 && (b & 0x7f) == 0x7f) b ^= 1;
    if (format == QuantFormat::fp8_e5m2 && (b & 0x7f) >= 0x7c) b &= 0x83;
    if (e3m4 && (b & 0x7f) >= 0x70) b &= 0x8f;
    qdata.as<uint8_t>()[i] = b;
  }
  for (int64_t i = 0; i < scales; ++i) scale.as<float>()[i] = 0.01f + std::fabs(random_float());
  for (int64_t i = 0; i < scales; ++i) extra.as<uint8_t>()[i] = uint8_t(random_bits());
  for (int64_t i = 0; bits && i < scales; ++i) extra.as<uint8_t>()[i] &= (1 << bits) - 1;
  for (int64_t i = 0; i < nested; ++i) nested_scale.as<float>()[i] = random_float();
  for (int64_t i = 0; i < 256; ++i) map.as<float>()[i] = random_float();
  *shift.as<float>() = 1.5f;
  for (int64_t i = 0; i < m * k; ++i) x.as<float>()[i] = random_float();
  for (int64_t i = 0; i < m * n; ++i) dy.as<float>()[i] = random_float();
  for (int64_t i = 0; i < n; ++i) bias.as<float>()[i] = random_float();

  std::vector<double> w(size_t(n * k));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t* q = qdata.as<uint8_t>();
      const float* s = scale.as<float>();
      double& out = w[size_t(r * k + i)];
      if (nf4) {
        const int64_t e = r * k + i, block = e / g;
        const uint8_t b = q[e / 2];
        const float absmax = !c.layout.extra ? s[block]
            : map.as<float>()[extra.as<uint8_t>()[block]] * nested_scale.as<float>()[block / 256] +
                  *shift.as<float>();
        out = double(NF4[e % 2 ? b & 15 : b >> 4]) * absmax;
      } else if (bits) {
        const int64_t group = r * row_groups + (g > 0 ? i / g : 0);
        const int zero = c.layout.extra ? extra.as<uint8_t>()[group] : 1 << (bits - 1);
        int code = 0;
        for (int64_t j = i * bits; j < (i + 1) * bits; ++j)
          code |= (q[r * row_bytes + j / 8] >> j % 8 & 1) << (j - i * bits);
        out = double(code - zero) * s[group];
      } else {
        const uint8_t b = q[r * k + i];
        const double value =
            format == QuantFormat::int8 ? double(int8_t(b)) : fp8_value(b, format);
        out = value * s[g == 128 ? r / 128 * row_groups + i / 128
                        : g == -128 ? r * row_groups + i / 128 : g == 0 ? 0 : r];
      }
    }

  QuantMatmulArgs a{};
  a.w = {format, n, k, qdata.as<uint8_t>(), scale.as<float>(), DType::f32, nullptr,
         nullptr, map.as<float>(), shift.as<float>(), g};
  if (bits && c.layout.extra) a.w.zero_point = extra.as<uint8_t>();
  if (nf4 && c.layout.extra) {
    a.w.scale = extra.as<uint8_t>();
    a.w.nested_scale = nested_scale.as<float>();
  }
  a.m = m;
  a.threads = 3;
  if (c.dtype != DType::f32) return run_half(c, a, w, isa);
  a.x = x.as<float>();
  a.y = y.as<float>();
  a.bias = bias.as<float>();
  bool ok = GP_KERNEL(quant_matmul_forward)(a);
  a.x = dy.as<float>();
  a.y = dx.as<float>();
  a.bias = nullptr;
  ok = ok && GP_KERNEL(quant_matmul_backward)(a);

  // int8 activations: by rows for int8 weights, by groups for int4.
  const bool whole = g == -1 || g % 32 == 0;
  const bool rounds = format == QuantFormat::int8 || (format == QuantFormat::int4 && whole);
  std::vector<double> rounded;
  const int64_t x_group = g > 0 ? g : k;
  for (int64_t i = 0; i < m && rounds; ++i)
    for (int64_t e = 0; e < k; e += x_group)
      for (double v : as_int8(x.as<float>() + i * k + e, k - e < x_group ? k - e : x_group))
        rounded.push_back(v);
  Guarded y8(m * n * 4, c.at_end);
  a.x = x.as<float>();
  a.y = y8.as<float>();
  a.bias = bias.as<float>();
  ok = ok && (!rounds || GP_KERNEL(quant_matmul_int8)(a));

  double worst = 0, worst_dx = 0, worst8 = 0;  // in parts of the sum of magnitudes
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < n; ++r) {
      double sum = bias.as<float>()[r], size = std::fabs(sum) + 1e-30;
      for (int64_t e = 0; e < k; ++e) {
        const double term = double(x.as<float>()[i * k + e]) * w[size_t(r * k + e)];
        sum += term;
        size += std::fabs(term);
      }
      worst = std::fmax(worst, std::fabs(y.as<float>()[i * n + r] - sum) / size);
      if (!rounds) continue;
      sum = bias.as<float>()[r];
      for (int64_t e = 0; e < k; ++e) sum += rounded[size_t(i * k + e)] * w[size_t(r * k + e)];
      worst8 = std::fmax(worst8, std::fabs(y8.as<float>()[i * n + r] - sum) / size);
    }
    for (int64_t e = 0; e < k; ++e) {
      double sum = 0, size = 1e-30;
      for (int64_t r = 0; r < n; ++r) {
        const double term = double(dy.as<float>()[i * n + r]) * w[size_t(r * k + e)];
        sum += term;
        size += std::fabs(term);
      }
      worst_dx = std::fmax(worst_dx, std::fabs(dx.as<float>()[i * k + e] - sum) / size);
    }
  }
  // A few roundings each, and the longest run of additions is 64.
  if (!ok || !(worst < 5e-7) || !(worst_dx < 1e-6) || !(worst8 < 5e-7)) {
    std::printf("FAILED: %s %s m %ld n %ld k %ld: error %.2e, dx %.2e, int8 %.2e\n", isa,
                c.layout.name, long(m), long(n), long(k), worst, worst_dx, worst8);
    ++failures;
  }
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{1, 1}, {3, 33}, {7, 64}, {43, 172}, {130, 300}, {5, 640}};
  int runs = 0;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (!force_isa(isa)) continue;
    for (const Layout& layout : LAYOUTS)
      for (const auto& shape : shapes)
        for (int64_t m : {1, 2, 3, 4, 7, 9, 21})
          for (bool at_end : {true, false}) {
            state = 1;
            run({layout, m, shape[0], shape[1], at_end, DType::f32}, isa_name(isa));
            ++runs;
            const bool rounds = layout.format == QuantFormat::nf4 || layout.format == QuantFormat::int4;
            for (DType dtype : {DType::bf16, DType::f16}) {
              if (!rounds || m > 8 || m == 2) continue;
              run({layout, m, shape[0], shape[1], at_end, dtype}, isa_name(isa));
              ++runs;
            }
          }
  }
  std::printf("%d runs, %s\n", runs, failures ? "FAILED" : "ok");
  return failures != 0;
}
