// nf4, fp4 and int4 weights against a few rows of x. What bounds it is how fast codes become floats in
// registers; so x is laid out once, in the order in which they come. Whatever the number of rows, a
// row of x meets a row of W in the same order of operations.
#include "common/parallel.h"
#include "cpu/quant_matmul_chunk.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t MAX_LAYOUT = int64_t(1) << 21;  // floats of one row of x in all its layouts
constexpr int MAX_ROWS = 4;  // rows of x that share one decoding in registers

// Scales of groups first..end-1 as floats, and zeros up to `count` of them.
void read_scales(const QuantWeight& w, int64_t first, int64_t end, int64_t count, float* out) {
  const int64_t there = end - first < count ? end - first : count;
  if (!w.nested_scale) {
    load_row(out, offset(w.scale, first, w.scale_dtype), there, w.scale_dtype);
  } else {
    const uint8_t* codes = static_cast<const uint8_t*>(w.scale) + first;
    const float* map = w.dynamic_map;
    const float shift = *w.scale_offset;
    for (int64_t i = 0; i < there;) {  // 256 scales share a nested one
      const float nested = w.nested_scale[(first + i) / 256];
      const int64_t stop = ((first + i) / 256 + 1) * 256 - first, last = stop < there ? stop : there;
      for (; i + 4 <= last; i += 4) {
        const float a = map[codes[i]], b = map[codes[i + 1]];
        const float c = map[codes[i + 2]], d = map[codes[i + 3]];
        out[i] = a * nested + shift;
        out[i + 1] = b * nested + shift;
        out[i + 2] = c * nested + shift;
        out[i + 3] = d * nested + shift;
      }
      for (; i < last; ++i) out[i] = map[codes[i]] * nested + shift;
    }
  }
  for (int64_t i = there; i < count; ++i) out[i] = 0.0f;
}

// --- one row of W --------------------------------------------------------------------------------

struct Row {
  const uint8_t* p;    // chunk 0
  const float* scale;
  Zeros zeros;
  const float* x;      // rows of x, laid out for this row of W
  int64_t chunks;
  int64_t into;        // weights of the first group that stand before chunk 0
  int64_t ahead;       // bytes from a weight to the one to prefetch
};

// sums[m] (two vectors each) += chunks c0..c1-1 of the row times x, which begins with chunk c0.
// Two sums for each row of x, each four products long before it meets the scale: one of eight would
// keep too few chunks in flight, and more would cost more to add up.
template <int M, bool HasZero, bool OneGroup, class Codec>
__attribute__((noinline)) void dot_piece(const Codec& codec, const Lanes& lanes, const Row& row,
                                         int64_t c0, int64_t c1, const float* x, int64_t x_stride,
                                         float* sums) {
  vf acc[M][2];
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) acc[m][h] = v_load(sums + (2 * m + h) * VL);
  const uint8_t* p = row.p + c0 * CHUNK_BYTES;
  for (int64_t c = c0; c < c1; ++c, p += CHUNK_BYTES, x += CHUNK) {
    prefetch(p + row.ahead);
    const int64_t e = c * CHUNK + row.into;
    vf w[8];
    codec.decode(p, row.zeros, lanes, e, w);
    const vf scale = lanes.at<OneGroup>(row.scale, e);
    for (int m = 0; m < M; ++m) {
      vf even, odd;
      multiply_chunk(w, x + m * x_stride, even, odd);
      acc[m][0] = v_fma(even, scale, acc[m][0]);
      acc[m][1] = v_fma(odd, scale, acc[m][1]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) v_store(sums + (2 * m + h) * VL, acc[m][h]);
}

template <bool HasZero, bool OneGroup, class Codec>
void dot_piece(int64_t m, const Codec& codec, const Lanes& lanes, const Row& row, int64_t c0,
               int64_t c1, const float* x, int64_t x_stride, float* sums) {
  auto* f = m == 1 ? &dot_piece<1, HasZero, OneGroup, Codec>
          : m == 2 ? &dot_piece<2, HasZero, OneGroup, Codec>
          : m == 3 ? &dot_piece<3, HasZero, OneGroup, Codec>
                   : &dot_piece<4, HasZero, OneGroup, Codec>;
  f(codec, lanes, row, c0, c1, x, x_stride, sums);
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x < high ? x : high; }
int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// --- the whole product ---------------------------------------------------------------------------

// How rows of W and of x stand on the grid of chunks.
struct Grid {
  // Rows of int4 begin with a chunk. A book's chunks stand on the grid of the flat array, where row r
  // begins r*k % CHUNK weights into a chunk: x is laid out once for each such phase, with zeros
  // where a chunk reaches into other rows.
  explicit Grid(const QuantWeight& w)
      : flat(has_book(w.format)),
        k(w.k),
        step(flat ? gcd(w.k, CHUNK) : CHUNK),
        phases(CHUNK / step),
        chunks((w.k + CHUNK - step + CHUNK - 1) / CHUNK),
        g(w.group_size > 0 ? w.group_size : int64_t(1) << 48),
        row_groups((w.k + g - 1) / g),
        row_bytes((w.k + 1) / 2),
        bytes(flat ? (w.n * w.k + 1) / 2 : w.n * row_bytes),
        groups(flat ? (w.n * w.k + g - 1) / g : w.n * row_groups) {}
  int64_t first(int64_t r) const { return flat ? r * k / CHUNK * CHUNK : 0; }
  int64_t phase(int64_t r) const { return flat ? r * k % CHUNK : 0; }

  bool flat;
  int64_t k, step, phases, chunks, g, row_groups, row_bytes, bytes, groups;
};

// x in the codec's order: xp[phase][m][chunk].
template <class Codec>
void pack_x(const QuantMatmulArgs& a, const Grid& grid, float* row, float* xp) {
  int order[CHUNK];
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < VL; ++i) order[j * VL + i] = Codec::element(j, i);
  for (int64_t m = 0; m < a.m; ++m) {
    load_row(row, offset(a.x, m * grid.k, a.dtype), grid.k, a.dtype);
    for (int64_t phase = 0; phase < grid.phases; ++phase) {
      float* out = xp + (phase * a.m + m) * grid.chunks * CHUNK;
      for (int64_t c = 0; c < grid.chunks; ++c, out += CHUNK) {
        const int64_t first = c * CHUNK - phase * grid.step;
        if (first >= 0 && first + CHUNK <= grid.k) {
          for (int e = 0; e < CHUNK; ++e) out[e] = row[first + order[e]];
        } else {
          for (int e = 0; e < CHUNK; ++e) {
            const int64_t at = first + order[e];
            out[e] = at >= 0 && at < grid.k ? row[at] : 0.0f;
          }
        }
      }
    }
  }
}

template <class Codec, bool HasZero, bool OneGroup>
bool run(const QuantMatmulArgs& a, const Grid& grid, const Lanes& lanes) {
  const QuantWeight& w = a.w;
  const int64_t n = w.n, m = a.m, x_stride = grid.chunks * CHUNK;
  // One thread decodes so many in 15 us; waking another takes as long.
  const int threads = n * grid.k < (1 << 18) ? 1 : a.threads;
  // Rows of W in one item: some 256 KiB. What is asked for ahead of an item goes to the wrong thread.
  const int64_t rows = clamp((1 << 18) / grid.row_bytes, 1, clamp(n / (2 * threads), 1, 256));
  // Pieces of columns, so that the x of all rows takes half of a first-level cache.
  const int64_t piece = 4096 / CHUNK / m, pieces = (grid.chunks + piece - 1) / piece;
  const int64_t ahead = pieces == 1 ? 8192 : grid.row_bytes * 2 * m;
  // Scales and zero points of a row, with room for the last load of lanes.
  const int64_t buffer = (grid.chunks * CHUNK / grid.g + 2 + VL + 15) / 16 * 16;
  const bool plain_scales = OneGroup && !w.nested_scale && w.scale_dtype == DType::f32;
  const int64_t row_floats = 2 * m * VL + (plain_scales ? 0 : buffer) + (OneGroup ? 0 : buffer);

  Scratch packed(grid.phases * m * x_stride * 4), plain(grid.k * 4);
  Scratch floats(threads * rows * row_floats * 4), heads(threads * rows * int64_t(sizeof(Row)));
  Scratch tail((grid.chunks + 1) * CHUNK_BYTES);
  if (!packed.ok() || !plain.ok() || !floats.ok() || !heads.ok() || !tail.ok()) return false;
  const float* xp = packed.as<float>();
  pack_x<Codec>(a, grid, plain.as<float>(), packed.as<float>());
  // The bytes may end before the last chunk does: the last rows are read from a copy.
  const int64_t copied = clamp(grid.chunks * CHUNK_BYTES, 0, grid.bytes);
  std::memset(tail.as<uint8_t>() + copied, 0, size_t((grid.chunks + 1) * CHUNK_BYTES - copied));
  std::memcpy(tail.as<uint8_t>(), w.qdata + grid.bytes - copied, size_t(copied));

  const Codec codec;
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    Row* row = heads.as<Row>() + thread * rows;
    float* sums = floats.as<float>() + thread * rows * row_floats;
    float* scales = sums + rows * 2 * m * VL;
    float* zeros = scales + (plain_scales ? 0 : rows * buffer);
    const int64_t r0 = item * rows, count = clamp(n - r0, 0, rows);
    std::memset(sums, 0, size_t(count * 2 * m * VL) * 4);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t first = grid.first(r0 + r), phase = grid.phase(r0 + r);
      const int64_t group = grid.flat ? first / grid.g : (r0 + r) * grid.row_groups;
      const int64_t end = grid.flat ? grid.groups : group + grid.row_groups;
      const int64_t at = grid.flat ? first / 2 : (r0 + r) * grid.row_bytes;
      const int64_t chunks = (phase + grid.k + CHUNK - 1) / CHUNK;
      Row& head = row[r];
      head.p = at + chunks * CHUNK_BYTES <= grid.bytes
          ? w.qdata + at : tail.as<uint8_t>() + at - (grid.bytes - copied);
      head.scale = plain_scales ? static_cast<const float*>(w.scale) + group : scales + r * buffer;
      head.zeros = {HasZero ? w.zero_point + group : nullptr, zeros + r * buffer};
      head.chunks = chunks;
      head.x = xp + phase / grid.step * m * x_stride;
      head.into = first % grid.g;
      head.ahead = ahead;
      if (!plain_scales) read_scales(w, group, end, buffer, scales + r * buffer);
      for (int64_t i = 0; HasZero && !OneGroup && i < buffer; ++i)
        zeros[r * buffer + i] = group + i < end ? float(w.zero_point[group + i]) : 0.0f;
    }
    for (int64_t c0 = 0; c0 < grid.chunks; c0 += piece)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t c1 = clamp(c0 + piece, 0, row[r].chunks);
        for (int64_t m0 = 0; m0 < m && c0 < c1; m0 += MAX_ROWS)
          dot_piece<HasZero, OneGroup>(m - m0, codec, lanes, row[r], c0, c1,
                                       row[r].x + m0 * x_stride + c0 * CHUNK, x_stride,
                                       sums + (r * m + m0) * 2 * VL);
      }
    for (int64_t r = 0; r < count; ++r) {
      const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
      for (int64_t i = 0; i < m; ++i) {
        const float* sum = sums + (r * m + i) * 2 * VL;
        const float y = v_sum(v_add(v_load(sum), v_load(sum + VL)));
        store_one(a.y, i * n + r0 + r, y + bias, a.dtype);
      }
    }
  });
  return true;
}

}  // namespace

bool quant_matmul_few_4bit(const QuantMatmulArgs& a) {
  const Grid grid(a.w);
  // A long odd k needs x laid out in as many ways as a chunk has weights; not for any number of rows,
  // so that the order of summation never depends on it.
  if (grid.phases * grid.chunks * CHUNK > MAX_LAYOUT) return quant_matmul_many(a);
  const Lanes lanes(grid.g);
  const bool zero = a.w.zero_point != nullptr, fp4 = a.w.format == QuantFormat::fp4;
  if (lanes.one_group()) {
    if (fp4) return run<BookCodec<true>, false, true>(a, grid, lanes);
    if (grid.flat) return run<BookCodec<false>, false, true>(a, grid, lanes);
    return zero ? run<Int4Codec<true, true>, true, true>(a, grid, lanes)
                : run<Int4Codec<false, true>, false, true>(a, grid, lanes);
  }
  if (fp4) return run<BookCodec<true>, false, false>(a, grid, lanes);
  if (grid.flat) return run<BookCodec<false>, false, false>(a, grid, lanes);
  return zero ? run<Int4Codec<true, false>, true, false>(a, grid, lanes)
              : run<Int4Codec<false, false>, false, false>(a, grid, lanes);
}

}  // namespace GP_ISA
}  // namespace gp
