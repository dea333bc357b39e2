// nf4 and int4 weights against a few rows of x. What bounds it is how fast codes become floats in
// registers; so x is laid out once, in the order in which they come.
//
// A chunk is 8*VL weights in 4*VL bytes, decoded to eight vectors. Each lane holds weights of one
// run of 8 (or, nf4 on AVX2, its half of the chunk), so a group that is a multiple of 8 owns whole
// lanes: the products of a chunk are summed first and meet their lane's scale once.
#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"

namespace gp {
namespace GP_ISA {
namespace {

#define GP_INLINE __attribute__((always_inline))

constexpr int CHUNK = 8 * VL;
constexpr int CHUNK_BYTES = 4 * VL;
constexpr int MAX_ROWS = 4;  // rows of x that share one decoding in registers

// Codec: element(j, i) is the weight of the chunk that stands in lane i of vector j;
// decode(p, zero, use) calls use(j, weights) for j = 0..7.

#if defined(__AVX2__) && !defined(__AVX512F__)

struct Nf4Codec {
  Lut lut = make_lut(NF4);
  static int element(int j, int i) {
    const int byte = 4 * (j & 3) + (i & 3) + (i < 4 ? 0 : 16);
    return 2 * byte + (j < 4 ? 0 : 1);
  }
  template <class F>
  GP_INLINE void decode(const uint8_t* p, vf, F&& use) const {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i mask = _mm256_set1_epi8(15);
    __m256 f[4];
    lookup32(lut, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), f);
    for (int r = 0; r < 4; ++r) use(r, vf{f[r]});
    lookup32(lut, _mm256_and_si256(v, mask), f);
    for (int r = 0; r < 4; ++r) use(4 + r, vf{f[r]});
  }
};

// A nibble at bit 4j of a float's mantissa, under the exponent of 2^(23-4j), is that power plus the
// code; subtracting the power and the zero point in one step is exact.
template <bool HasZero>
struct Int4Codec {
  static int element(int j, int i) { return 8 * i + j; }
  template <class F>
  GP_INLINE void decode(const uint8_t* p, vf zero, F&& use) const {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i h = _mm256_srli_epi32(v, 16);
    const vf z = HasZero ? zero : v_set(8.0f);
    four<0>(v, h, z, use);
    four<1>(v, h, z, use);
    four<2>(v, h, z, use);
    four<3>(v, h, z, use);
  }

 private:
  template <int J, class F>
  GP_INLINE static void four(__m256i v, __m256i h, vf zero, F&& use) {
    const __m256i mask = _mm256_set1_epi32(15 << 4 * J);
    const __m256 power = _mm256_set1_ps(float(1 << (23 - 4 * J)));
    const __m256 base = _mm256_add_ps(power, zero.v);
    const __m256 a = _mm256_or_ps(_mm256_castsi256_ps(_mm256_and_si256(v, mask)), power);
    const __m256 b = _mm256_or_ps(_mm256_castsi256_ps(_mm256_and_si256(h, mask)), power);
    use(J, vf{_mm256_sub_ps(a, base)});
    use(J + 4, vf{_mm256_sub_ps(b, base)});
  }
};

#else

#if defined(__AVX512F__)
template <int J>
GP_INLINE inline vf look(__m512 table, __m512i v) {
  // vpermps looks at the low four bits of each lane alone.
  return {_mm512_permutexvar_ps(J ? _mm512_srli_epi32(v, 4 * J) : v, table)};
}
#define GP_CHUNK_OF(p) _mm512_loadu_si512(p)
#else
template <int J>
GP_INLINE inline vf look(const float* table, uint32_t v) { return {table[v >> 4 * J & 15]}; }
static inline uint32_t GP_CHUNK_OF(const uint8_t* p) {
  return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}
#endif

template <bool HighFirst, bool HasZero>
struct TableCodec {
#if defined(__AVX512F__)
  __m512 table;
  explicit TableCodec(const float* t) : table(_mm512_loadu_ps(t)) {}
#else
  const float* table;
  explicit TableCodec(const float* t) : table(t) {}
#endif
  static int element(int j, int i) { return 8 * i + (HighFirst ? j ^ 1 : j); }
  template <class F>
  GP_INLINE void decode(const uint8_t* p, vf zero, F&& use) const {
    const auto v = GP_CHUNK_OF(p);
    use(0, shift(look<0>(table, v), zero));
    use(1, shift(look<1>(table, v), zero));
    use(2, shift(look<2>(table, v), zero));
    use(3, shift(look<3>(table, v), zero));
    use(4, shift(look<4>(table, v), zero));
    use(5, shift(look<5>(table, v), zero));
    use(6, shift(look<6>(table, v), zero));
    use(7, shift(look<7>(table, v), zero));
  }

 private:
  GP_INLINE static vf shift(vf code, vf zero) { return HasZero ? v_sub(code, zero) : code; }
};

constexpr float SIGNED_CODES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

struct Nf4Codec : TableCodec<true, false> {
  Nf4Codec() : TableCodec(NF4) {}
};
template <bool HasZero>
struct Int4Codec : TableCodec<false, HasZero> {
  Int4Codec() : TableCodec<false, HasZero>(HasZero ? UNSIGNED_CODES : SIGNED_CODES) {}
};

#endif

// --- scales by lane ------------------------------------------------------------------------------

// Values of groups of g weights (a multiple of 8), as vectors over the lanes of a chunk.
class Lanes {
 public:
  explicit Lanes(int64_t g) : g_(g) {
    while (shift_ < 62 && int64_t(1) << shift_ < g) ++shift_;
    power_ = int64_t(1) << shift_ == g;
    for (int i = 0; i < VL; ++i) lane_[i] = int32_t(8 * i / g);
  }
  // For the chunk that begins at weight e; values[0] is that of weights 0..g-1.
  GP_INLINE vf at(const float* values, int64_t e) const {
    if (power_ && g_ >= CHUNK) return v_set(values[e >> shift_]);
#if defined(__AVX512F__)
    if (power_) return {_mm512_permutexvar_ps(_mm512_loadu_si512(lane_),
                                              _mm512_loadu_ps(values + (e >> shift_)))};
#elif defined(__AVX2__)
    if (power_) return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(values + (e >> shift_)),
                                                 _mm256_load_si256((const __m256i*)lane_))};
#endif
    float lanes[VL];
    for (int i = 0; i < VL; ++i) lanes[i] = values[(e + 8 * i) / g_];
    return v_load(lanes);
  }

 private:
  int64_t g_;
  int shift_ = 3;
  bool power_;
  alignas(64) int32_t lane_[16];
};

// Scales of `count` groups from `first` on as floats, zeros from group `end` on.
void read_scales(const QuantWeight& w, int64_t first, int64_t end, int64_t count, float* out) {
  const int64_t there = end - first < count ? end - first : count;
  if (w.nested_scale) for (int64_t i = 0; i < there; ++i) out[i] = block_scale(w, first + i);
  else load_row(out, offset(w.scale, first, w.scale_dtype), there, w.scale_dtype);
  for (int64_t i = there; i < count; ++i) out[i] = 0.0f;
}

// --- one row of W --------------------------------------------------------------------------------

struct Row {
  const uint8_t* p;     // chunk 0
  const uint8_t* end;   // of all packed bytes
  const float* scale;
  const float* zero;
  const float* x;       // rows of x in the codec's order, x_stride apart
  int64_t x_stride, chunks;
  int64_t into;         // weights of the first group that stand before chunk 0
};

template <int M, bool HasZero, class Codec>
GP_INLINE inline void add_chunk(const Codec& codec, const Lanes& lanes, const Row& row, int64_t c,
                                const uint8_t* p, vf acc[M]) {
  const vf zero = HasZero ? lanes.at(row.zero, c * CHUNK + row.into) : v_zero();
  const float* x = row.x + c * CHUNK;
  vf sum[M];
  codec.decode(p, zero, [&](int j, vf w) GP_INLINE {
    for (int m = 0; m < M; ++m) {
      const vf xm = v_load(x + m * row.x_stride + j * VL);
      sum[m] = j == 0 ? v_mul(w, xm) : v_fma(w, xm, sum[m]);
    }
  });
  const vf scale = lanes.at(row.scale, c * CHUNK + row.into);
  for (int m = 0; m < M; ++m) acc[m] = v_fma(sum[m], scale, acc[m]);
}

template <int M, bool HasZero, class Codec>
void dot_row(const Codec& codec, const Lanes& lanes, const Row& row, float* out) {
  vf acc[M];
  for (int m = 0; m < M; ++m) acc[m] = v_zero();
  const int64_t whole = (row.end - row.p) / CHUNK_BYTES;
  const int64_t chunks = row.chunks < whole ? row.chunks : whole;
  for (int64_t c = 0; c < chunks; ++c)
    add_chunk<M, HasZero>(codec, lanes, row, c, row.p + c * CHUNK_BYTES, acc);
  if (chunks < row.chunks) {  // the bytes end inside the last chunk of the last rows
    uint8_t tail[CHUNK_BYTES] = {};
    const uint8_t* p = row.p + chunks * CHUNK_BYTES;
    std::memcpy(tail, p, size_t(row.end - p));
    add_chunk<M, HasZero>(codec, lanes, row, chunks, tail, acc);
  }
  for (int m = 0; m < M; ++m) out[m] = v_sum(acc[m]);
}

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// --- the whole product ---------------------------------------------------------------------------

template <class Codec, bool HasZero>
bool run(const QuantMatmulArgs& a) {
  const QuantWeight& w = a.w;
  const bool nf4 = w.format == QuantFormat::nf4;
  const int64_t n = w.n, k = w.k, m = a.m;
  // Chunks of nf4 stand on the grid of the flat array, where row r begins r*k % CHUNK after a chunk:
  // x is laid out once for each such phase, with zeros where a chunk reaches into other rows.
  const int64_t step = nf4 ? gcd(k, CHUNK) : CHUNK;
  const int64_t phases = CHUNK / step;
  const int64_t chunks = (k + CHUNK - step + CHUNK - 1) / CHUNK;
  const int64_t g = w.group_size > 0 ? w.group_size : int64_t(1) << 48;
  const int64_t row_groups = (k + g - 1) / g;                      // int4
  const int64_t groups = chunks * CHUNK / g + 2;                   // that a row can touch
  const int64_t buffer = (groups + VL + 15) / 16 * 16;
  const int64_t total_bytes = nf4 ? (n * k + 1) / 2 : n * ((k + 1) / 2);
  const int64_t total_groups = nf4 ? (n * k + g - 1) / g : n * row_groups;

  // Waking the other threads costs some 5 us, in which one decodes some 64 k weights.
  const int threads = n * k < 65536 ? 1 : a.threads;
  Scratch packed(phases * m * chunks * CHUNK * 4), plain(k * 4), scales(threads * 2 * buffer * 4);
  if (!packed.ok() || !plain.ok() || !scales.ok()) return false;
  float* xp = packed.as<float>();
  int order[CHUNK];
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < VL; ++i) order[j * VL + i] = Codec::element(j, i);
  for (int64_t r = 0; r < m; ++r) {
    float* x = plain.as<float>();
    load_row(x, offset(a.x, r * k, a.dtype), k, a.dtype);
    for (int64_t phase = 0; phase < phases; ++phase) {
      float* dst = xp + (phase * m + r) * chunks * CHUNK;
      for (int64_t c = 0; c < chunks; ++c, dst += CHUNK) {
        const int64_t first = c * CHUNK - phase * step;
        if (first >= 0 && first + CHUNK <= k) {
          for (int e = 0; e < CHUNK; ++e) dst[e] = x[first + order[e]];
        } else {
          for (int e = 0; e < CHUNK; ++e) {
            const int64_t at = first + order[e];
            dst[e] = at >= 0 && at < k ? x[at] : 0.0f;
          }
        }
      }
    }
  }

  const Codec codec;
  const Lanes lanes(g);
  const int64_t rows = [&] {  // of W in one item: some 64 KiB
    const int64_t r = 131072 / (k + 1) + 1, fair = (n + 2 * threads - 1) / (2 * threads);
    return r < fair ? r : fair;
  }();
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* scale = scales.as<float>() + thread * 2 * buffer;
    float* zero = scale + buffer;
    const int64_t last = (item + 1) * rows < n ? (item + 1) * rows : n;
    for (int64_t r = item * rows; r < last; ++r) {
      const int64_t flat = nf4 ? r * k : 0, phase = flat % CHUNK;
      const int64_t group = nf4 ? (flat - phase) / g : r * row_groups;
      const int64_t group_end = nf4 ? total_groups : group + row_groups;
      read_scales(w, group, group_end, buffer, scale);
      if (HasZero)
        for (int64_t i = 0; i < buffer; ++i)
          zero[i] = group + i < group_end ? float(w.zero_point[group + i]) : 0.0f;
      Row row{w.qdata + (nf4 ? (flat - phase) / 2 : r * ((k + 1) / 2)), w.qdata + total_bytes,
              scale, zero, nullptr, chunks * CHUNK, 0, nf4 ? (flat - phase) % g : 0};
      row.chunks = (phase + k + CHUNK - 1) / CHUNK;
      const float bias = a.bias ? load_one(a.bias, r, a.bias_dtype) : 0.0f;
      for (int64_t m0 = 0; m0 < m; m0 += MAX_ROWS) {
        row.x = xp + (phase / step * m + m0) * chunks * CHUNK;
        const int64_t left = m - m0;
        float out[MAX_ROWS];
        if (left == 1) dot_row<1, HasZero>(codec, lanes, row, out);
        else if (left == 2) dot_row<2, HasZero>(codec, lanes, row, out);
        else if (left == 3) dot_row<3, HasZero>(codec, lanes, row, out);
        else dot_row<4, HasZero>(codec, lanes, row, out);
        for (int64_t i = 0; i < left && i < MAX_ROWS; ++i)
          store_one(a.y, (m0 + i) * n + r, out[i] + bias, a.dtype);
      }
    }
  });
  return true;
}

}  // namespace

bool quant_matmul_few_4bit(const QuantMatmulArgs& a) {
  if (a.w.format == QuantFormat::nf4) return run<Nf4Codec, false>(a);
  return a.w.zero_point ? run<Int4Codec<true>, true>(a) : run<Int4Codec<false>, false>(a);
}

}  // namespace GP_ISA
}  // namespace gp
