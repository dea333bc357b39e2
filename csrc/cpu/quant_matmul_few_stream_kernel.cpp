// int3 and int2 weights against a few rows of x. Eight codes fill 24 or 16 bits: they go into one lane,
// and a permutation of eight floats by each lane's low bits makes floats of the first codes of all
// lanes, of the second after a shift, and so on; x is laid out once in that order. Whatever the number
// of rows, a row of x meets a row of W in the same order of operations.
#include "common/parallel.h"
#include "cpu/quant_matmul_chunk.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int MAX_ROWS = 4;  // rows of x that share one decoding in registers
constexpr int64_t SPAN = 4;  // chunks between two additions to the total
constexpr int64_t OVER = 4;  // bytes that `load_words` may read behind a chunk

// A chunk, as in quant_matmul_chunk.h, is 8*VL weights, here in BITS*VL bytes; lane i holds 8i..8i+7.
#if defined(__AVX512F__)
using Words = __m512i;
template <int BITS>
GP_INLINE inline Words load_words(const uint8_t* p) {
  if (BITS == 2)
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i bytes = _mm512_maskz_loadu_epi32(0x1fff, p);
  const __m512i quarters = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12), bytes);
  return _mm512_shuffle_epi8(quarters, _mm512_broadcast_i32x4(_mm_setr_epi8(
      0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
}
// Only the lowest bits of a lane count: the table repeats itself.
template <int SHIFT>
GP_INLINE inline vf look(vf table, Words v) {
  return {_mm512_permutexvar_ps(SHIFT ? _mm512_srli_epi32(v, SHIFT) : v, table.v)};
}
#elif defined(__AVX2__)
using Words = __m256i;
template <int BITS>
GP_INLINE inline Words load_words(const uint8_t* p) {
  const __m128i* at = reinterpret_cast<const __m128i*>(p);
  if (BITS == 2) return _mm256_cvtepu16_epi32(_mm_loadu_si128(at));
  const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 12));
  const __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(at)), upper, 1);
  return _mm256_shuffle_epi8(halves, _mm256_broadcastsi128_si256(_mm_setr_epi8(
      0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
}
template <int SHIFT>
GP_INLINE inline vf look(vf table, Words v) {
  return {_mm256_permutevar8x32_ps(table.v, SHIFT ? _mm256_srli_epi32(v, SHIFT) : v)};
}
#else
struct Words {
  uint32_t bits, mask;
};
template <int BITS>
GP_INLINE inline Words load_words(const uint8_t* p) {
  const uint32_t low = uint32_t(p[0]) | uint32_t(p[1]) << 8;
  return {BITS == 3 ? low | uint32_t(p[2]) << 16 : low, (1u << BITS) - 1};
}
template <int SHIFT>
GP_INLINE inline vf look(vf table, Words v) { return {float(v.bits >> SHIFT & v.mask) + table.v}; }
#endif

// Values of the codes, less a zero point.
template <int BITS>
GP_INLINE inline vf values(vf zero) {
  float codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = float(i & ((1 << BITS) - 1));
  return v_sub(v_load(codes), zero);
}

template <int BITS>
GP_INLINE inline void look_all(vf table, Words v, vf* w) {
  w[0] = look<0>(table, v);
  w[1] = look<BITS>(table, v);
  w[2] = look<2 * BITS>(table, v);
  w[3] = look<3 * BITS>(table, v);
  w[4] = look<4 * BITS>(table, v);
  w[5] = look<5 * BITS>(table, v);
  w[6] = look<6 * BITS>(table, v);
  w[7] = look<7 * BITS>(table, v);
}

// One row of W: its bytes, and scales and zero points (null: 2^(BITS-1)) of its groups.
struct Row {
  const uint8_t* p;
  const float* scale;
  const float* zero;
};

// sums[m] += chunks c0..c1-1 of the row times x, which begins with chunk c0, a multiple of SPAN.
template <int BITS, bool HasZero, bool OneGroup, int M>
void dot(const Lanes& lanes, const Row& row, int64_t c0, int64_t c1, int64_t ahead, const float* x,
         int64_t x_stride, float* sums) {
  const vf plain = values<BITS>(v_set(HasZero ? 0.0f : float(1 << (BITS - 1))));
  const uint8_t* p = row.p + c0 * BITS * VL;
  while (c0 < c1) {
    const int64_t end = c0 + SPAN < c1 ? c0 + SPAN : c1;
    vf part[M];
    for (int m = 0; m < M; ++m) part[m] = v_zero();
    for (; c0 < end; ++c0, p += BITS * VL, x += CHUNK) {
      prefetch(p + ahead);
      const int64_t e = c0 * CHUNK;
      const vf scale = lanes.at<OneGroup>(row.scale, e);
      vf zero = v_zero(), w[8];
      if (HasZero) zero = lanes.at<OneGroup>(row.zero, e);
      look_all<BITS>(HasZero && OneGroup ? v_sub(plain, zero) : plain, load_words<BITS>(p), w);
      if (HasZero && !OneGroup)
        for (int j = 0; j < 8; ++j) w[j] = v_sub(w[j], zero);
      for (int m = 0; m < M; ++m) {
        vf even, odd;
        multiply_chunk(w, x + m * x_stride, even, odd);
        part[m] = v_fma(v_add(even, odd), scale, part[m]);
      }
    }
    for (int m = 0; m < M; ++m) v_store(sums + m * VL, v_add(v_load(sums + m * VL), part[m]));
  }
}

// x (m, k) in the order of a chunk's lanes: [m][chunk][j][lane], zeros behind column k.
void pack_x(const QuantMatmulArgs& a, int64_t chunks, float* row, float* xp) {
  for (int64_t m = 0; m < a.m; ++m, xp += chunks * CHUNK) {
    load_row(row, offset(a.x, m * a.w.k, a.dtype), a.w.k, a.dtype);
    for (int64_t at = a.w.k; at < chunks * CHUNK; ++at) row[at] = 0.0f;
    for (int64_t c = 0; c < chunks * CHUNK; c += CHUNK)
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < VL; ++i) xp[c + j * VL + i] = row[c + 8 * i + j];
  }
}

template <int BITS, bool HasZero, bool OneGroup>
bool run(const QuantMatmulArgs& a, const Lanes& lanes, int64_t group) {
  const QuantWeight& w = a.w;
  const int64_t n = w.n, m = a.m, chunks = (w.k + CHUNK - 1) / CHUNK, x_stride = chunks * CHUNK;
  const int64_t row_bytes = (w.k * BITS + 7) / 8, read_bytes = chunks * BITS * VL + OVER;
  const int64_t groups = (w.k + group - 1) / group;
  // One thread decodes so many in 15 us; waking another takes as long.
  const int threads = n * w.k < (1 << 18) ? 1 : a.threads;
  const int64_t most = n / (2 * threads) < 64 ? n / (2 * threads) : 64, rows = most < 1 ? 1 : most;
  // Pieces of columns, so that the x of all rows takes half of a first-level cache.
  const int64_t piece = 4096 / CHUNK / m / SPAN * SPAN, ahead = piece >= chunks ? 4096 : row_bytes;
  // Scales of a row, with room for the last load of lanes.
  const int64_t buffer = (x_stride / group + 2 + VL + 15) / 16 * 16;
  const int64_t floats = m * VL + buffer * (HasZero ? 2 : 1);

  Scratch packed(m * x_stride * 4), plain(x_stride * 4), own(threads * rows * floats * 4);
  Scratch copies(threads * rows * read_bytes), heads(threads * rows * int64_t(sizeof(Row)));
  if (!packed.ok() || !plain.ok() || !own.ok() || !copies.ok() || !heads.ok()) return false;
  const float* xp = packed.as<float>();
  pack_x(a, chunks, plain.as<float>(), packed.as<float>());
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    Row* row = heads.as<Row>() + thread * rows;
    float* sums = own.as<float>() + thread * rows * floats;
    float* scales = sums + rows * m * VL;
    float* zeros = scales + rows * buffer;
    const int64_t r0 = item * rows, count = r0 + rows < n ? rows : n - r0;
    std::memset(sums, 0, size_t(rows * floats) * 4);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t first = (r0 + r) * groups, at = (r0 + r) * row_bytes;
      row[r] = {w.qdata + at, scales + r * buffer, zeros + r * buffer};
      load_row(scales + r * buffer, offset(w.scale, first, w.scale_dtype), groups, w.scale_dtype);
      for (int64_t i = 0; HasZero && i < groups; ++i)
        zeros[r * buffer + i] = float(w.zero_point[first + i]);
      if (at + read_bytes > n * row_bytes) {  // the last rows are read from a copy
        uint8_t* copy = copies.as<uint8_t>() + (thread * rows + r) * read_bytes;
        std::memset(copy, 0, size_t(read_bytes));
        std::memcpy(copy, row[r].p, size_t(row_bytes));
        row[r].p = copy;
      }
    }
    for (int64_t c0 = 0; c0 < chunks; c0 += piece) {
      const int64_t c1 = c0 + piece < chunks ? c0 + piece : chunks;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t m0 = 0; m0 < m; m0 += MAX_ROWS) {
          auto* f = m - m0 == 1 ? &dot<BITS, HasZero, OneGroup, 1>
                  : m - m0 == 2 ? &dot<BITS, HasZero, OneGroup, 2>
                  : m - m0 == 3 ? &dot<BITS, HasZero, OneGroup, 3>
                                : &dot<BITS, HasZero, OneGroup, 4>;
          f(lanes, row[r], c0, c1, ahead, xp + m0 * x_stride + c0 * CHUNK, x_stride,
            sums + (r * m + m0) * VL);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
      const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
      for (int64_t i = 0; i < m; ++i)
        store_one(a.y, i * n + r0 + r, v_sum(v_load(sums + (r * m + i) * VL)) + bias, a.dtype);
    }
  });
  return true;
}

template <int BITS>
bool run(const QuantMatmulArgs& a) {
  const int64_t group = a.w.group_size > 0 ? a.w.group_size : int64_t(1) << 48;
  const Lanes lanes(group);
  const bool zero = a.w.zero_point != nullptr;
  if (lanes.one_group())
    return zero ? run<BITS, true, true>(a, lanes, group) : run<BITS, false, true>(a, lanes, group);
  return zero ? run<BITS, true, false>(a, lanes, group) : run<BITS, false, false>(a, lanes, group);
}

}  // namespace

bool quant_matmul_few_stream(const QuantMatmulArgs& a) {
  return a.w.format == QuantFormat::int3 ? run<3>(a) : run<2>(a);
}

}  // namespace GP_ISA
}  // namespace gp
