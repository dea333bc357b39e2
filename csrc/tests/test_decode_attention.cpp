// Decode attention in every instruction set against double precision, without Python.
#include "cpu/decode_attention.h"

#include <cstring>

#include "tests/compare.h"

namespace {

struct Shape {
  int64_t batch, seqlen_q, heads, heads_k, dim, dim_v, capacity, page_size, window_left;
  bool causal;
  int threads;
  gp::DType cache, dtype;
};

constexpr float SCALE = 0.2f, K_SCALE = 1.0f / 100, V_SCALE = 1.0f / 50;

uint16_t to_bf16(float x) {  // towards zero
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Values that their type holds exactly, and the bytes of them.
struct Tensor {
  std::vector<double> value;
  std::vector<char> bytes;
  Tensor(int64_t n, gp::DType type, float scale, uint32_t& state) : value(n) {
    const int size = type == gp::DType::f32 ? 4 : type == gp::DType::i8 ? 1 : 2;
    bytes.resize(n * size);
    for (int64_t i = 0; i < n; ++i) {
      float x = noise(state);
      if (type == gp::DType::i8) {
        const int8_t code = int8_t(std::lround(127 * x));
        bytes[i] = char(code), value[i] = double(code) * scale;
        continue;
      }
      const uint16_t half = to_bf16(x);
      if (type == gp::DType::bf16) x = from_bf16(half);
      std::memcpy(bytes.data() + i * size, type == gp::DType::f32 ? (const void*)&x : &half, size);
      value[i] = x;
    }
  }
};

void check(const Shape& s) {
  uint32_t state = 1;
  const bool scaled = s.cache == gp::DType::i8;
  const int64_t pages = s.capacity / s.page_size, rows = s.batch * s.capacity;
  Tensor q(s.batch * s.seqlen_q * s.heads * s.dim, s.dtype, 1, state);
  Tensor k(rows * s.heads_k * s.dim, s.cache, K_SCALE, state);
  Tensor v(rows * s.heads_k * s.dim_v, s.cache, V_SCALE, state);
  std::vector<int32_t> lengths(s.batch), table(s.batch * pages);
  for (int64_t b = 0; b < s.batch; ++b) lengths[b] = int32_t(s.capacity - 7 * b);
  // Pages in another order: a step of 1 less than their number is prime to it.
  const int64_t all = s.batch * pages;
  for (int64_t i = 0; i < all; ++i) table[i] = int32_t((i * (all - 1) + 3) % all);
  const std::vector<float> k_scale(s.heads_k, K_SCALE), v_scale(s.heads_k, V_SCALE);
  const int64_t n_out = s.batch * s.seqlen_q * s.heads * s.dim_v;
  std::vector<float> out(n_out, NAN), lse(s.batch * s.heads * s.seqlen_q, NAN);
  std::vector<uint16_t> half(n_out, 0xffff);

  gp::DecodeArgs a{};
  a.batch = s.batch, a.seqlen_q = s.seqlen_q, a.heads = s.heads, a.heads_k = s.heads_k;
  a.dim = s.dim, a.dim_v = s.dim_v, a.window_left = s.window_left, a.window_right = s.causal ? 0 : -1;
  a.scale = SCALE, a.dtype = s.dtype, a.threads = s.threads, a.lse = lse.data();
  a.q = {q.bytes.data(), s.seqlen_q * s.heads * s.dim, s.heads * s.dim, s.dim};
  void* to = s.dtype == gp::DType::f32 ? (void*)out.data() : half.data();
  a.out = {to, s.seqlen_q * s.heads * s.dim_v, s.heads * s.dim_v, s.dim_v};
  const int64_t row_k = s.heads_k * s.dim, row_v = s.heads_k * s.dim_v;
  a.cache.k = {k.bytes.data(), s.page_size * row_k, row_k, s.dim};
  a.cache.v = {v.bytes.data(), s.page_size * row_v, row_v, s.dim_v};
  a.cache.dtype = s.cache, a.cache.seqlens = lengths.data();
  a.cache.block_table = table.data(), a.cache.table_stride = pages, a.cache.page_size = s.page_size;
  if (scaled) a.cache.k_scale = k_scale.data(), a.cache.v_scale = v_scale.data();
  if (!GP_KERNEL(decode_attention)(a)) ++failures;
  if (s.dtype == gp::DType::bf16)
    for (int64_t i = 0; i < n_out; ++i) out[i] = from_bf16(half[i]);

  std::vector<double> want(n_out, 0), want_lse(lse.size(), -INFINITY), p(s.capacity);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < s.seqlen_q; ++i)
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t head = h / (s.heads / s.heads_k), at = lengths[b] - s.seqlen_q + i;
        const int64_t row_q = (b * s.seqlen_q + i) * s.heads + h;
        double sum = 0;
        auto place = [&](int64_t j) {
          const int64_t page = table[b * pages + j / s.page_size];
          return (page * s.page_size + j % s.page_size) * s.heads_k + head;
        };
        for (int64_t j = 0; j < lengths[b]; ++j) {
          double x = 0;
          for (int64_t d = 0; d < s.dim; ++d)
            x += q.value[row_q * s.dim + d] * k.value[place(j) * s.dim + d];
          const bool seen = (!s.causal || j <= at) && (s.window_left < 0 || j >= at - s.window_left);
          sum += p[j] = seen ? std::exp(x * SCALE) : 0;
        }
        if (sum == 0) continue;
        want_lse[(b * s.heads + h) * s.seqlen_q + i] = std::log(sum);
        for (int64_t j = 0; j < lengths[b]; ++j)
          for (int64_t d = 0; d < s.dim_v; ++d)
            want[row_q * s.dim_v + d] += p[j] / sum * v.value[place(j) * s.dim_v + d];
      }
  // Half a step of bfloat16 below 1, and what int16 queries and weights add.
  const bool rounded = s.dtype == gp::DType::bf16;
  compare("out", out, want, rounded ? 2.5e-3 : 2e-5);
  compare("lse", lse, want_lse, rounded && scaled ? 1e-3 : 2e-5);
}

}  // namespace

int main() {
  using gp::DType;
  for (gp::Isa isa : {gp::Isa::scalar, gp::Isa::avx2, gp::Isa::avx512}) {
    if (!gp::force_isa(isa)) continue;
    // batch, seqlen_q, heads, heads_k, dim, dim_v, capacity, page_size, window_left, causal, threads
    check({1, 1, 8, 2, 64, 64, 48, 48, -1, false, 1, DType::f32, DType::f32});
    check({2, 3, 6, 2, 40, 24, 700, 7, -1, true, 2, DType::f32, DType::f32});
    check({3, 1, 5, 5, 96, 128, 130, 10, 31, true, 3, DType::bf16, DType::f32});
    check({2, 1, 28, 4, 128, 128, 1300, 13, -1, true, 2, DType::bf16, DType::bf16});
    check({2, 5, 8, 1, 64, 32, 260, 20, 100, true, 2, DType::i8, DType::f32});
    check({2, 1, 32, 8, 128, 128, 1300, 10, -1, false, 2, DType::i8, DType::bf16});
    check({1, 2, 7, 7, 64, 64, 75, 5, -1, true, 1, DType::i8, DType::bf16});
  }
  if (failures == 0) std::printf("decode attention: passed\n");
  return failures != 0;
}
